//! What an operator does about dead letters: looks at those that wait and, once their cause is mended, puts them back where
//! they were read. How far that went is kept in Kafka, as the offsets of a consumer group of its own.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    ops::Range,
    time::Duration,
};

use anyhow::Context as _;
use futures::FutureExt as _;
use platform::{config::KafkaConfig, error::StartError, kafka};
use rdkafka::{
    Message as _, TopicPartitionList,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::KafkaError,
    message::OwnedMessage,
    producer::{DeliveryFuture, FutureProducer, FutureRecord},
    topic_partition_list::Offset,
};

use crate::{
    config::Config,
    letter::{DeadLetter, Place, original},
};

/// Of the group whose offsets say which letters were put back: the service's own, and this.
const GROUP_SUFFIX: &str = ".dead-letters";
/// How long the broker may take for one answer.
const BROKER_BOUND: Duration = Duration::from_secs(5);
/// Of the group's members. A replay that was killed is in the way of the next one for so long; Kafka allows no less.
const SESSION: Duration = Duration::from_secs(6);
/// Letters that are put back before their offsets are committed: as many may be put back twice after a crash.
const BATCH: usize = 100;

/// Letters, and how many there are of them.
pub struct Listing {
    /// The oldest.
    pub letters: Vec<DeadLetter>,
    /// These, and those beyond the limit.
    pub total: u64,
}

/// What became of the letters that waited.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Acknowledged by the topic that they came from.
    pub put_back: u64,
    /// Copies of letters put back before: a crash between a letter and the offsets of its batch leaves two.
    pub copies: u64,
    /// They do not say where they came from, or are without the value that was too long to be kept.
    pub left: u64,
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dead letters put back", self.put_back)?;
        if self.copies > 0 {
            write!(f, ", {} copies of them passed over", self.copies)?;
        }
        if self.left > 0 {
            let why = "they have no origin or no value: see dead-letters list --all";
            write!(f, ", {} cannot be put back, {why}", self.left)?;
        }
        Ok(())
    }
}

/// Shows at most `limit` of the letters that wait, or of all that the topic still has.
///
/// # Errors
/// No broker answers, or the topic is missing.
pub async fn list(config: &Config, all: bool, limit: usize) -> anyhow::Result<Listing> {
    let topic = &config.kafka.dead_letter_topic;
    let consumer = consumer(config)?;
    let mut open = spans(&consumer, topic, all)?;
    let total = open.values().map(|span| span.end - span.start).sum::<i64>();
    let mut from = TopicPartitionList::new();
    for (partition, span) in &open {
        from.add_partition_offset(topic, *partition, Offset::Offset(span.start))?;
    }
    consumer.assign(&from)?;
    let mut letters = Vec::new();
    while letters.len() < limit && !open.is_empty() {
        if let Some(record) = next(&consumer, &mut open, BROKER_BOUND).await? {
            letters.push(DeadLetter::read(&record));
        }
    }
    Ok(Listing {
        letters,
        total: u64::try_from(total).unwrap_or_default(),
    })
}

/// Puts at most `limit` of the letters that wait back to their topics, each with its key, value, headers and time, in
/// its partition. Those that are still poison come back as new letters; they wait for the next replay, not for this one.
///
/// # Errors
/// No broker answers, the topic is missing, or another replay is at work. What was acknowledged before stays put back.
pub async fn replay(config: &Config, limit: u64) -> anyhow::Result<Replayed> {
    let topic = &config.kafka.dead_letter_topic;
    let consumer = consumer(config)?;
    // only what is there now: what comes back while we work would be put back for ever
    let mut open = spans(&consumer, topic, false)?;
    let mut replayed = Replayed::default();
    if open.is_empty() || limit == 0 {
        return Ok(replayed);
    }
    let producer: FutureProducer = kafka::producer_config(&config.brokers, &config.kafka)
        .set("message.timeout.ms", BROKER_BOUND.as_millis().to_string())
        .create()
        .context("prepare the producer")?;
    // a member of the group, not an assignment of our own: two replays at once share the partitions
    consumer.subscribe(&[topic])?;
    let mut seen = HashSet::new();
    let mut taken = 0;
    while taken < limit && !open.is_empty() {
        let most = usize::try_from(limit - taken).unwrap_or(BATCH).min(BATCH);
        let records = take(&consumer, &mut open, most).await?;
        taken += records.len() as u64;
        put_back(&producer, &consumer, &records, &mut seen, &mut replayed).await?;
    }
    Ok(replayed)
}

fn consumer(config: &Config) -> Result<StreamConsumer, StartError> {
    let kafka = KafkaConfig {
        group: format!("{}{GROUP_SUFFIX}", config.kafka.group),
        session_timeout: SESSION,
        ..config.kafka.clone()
    };
    let made = kafka::consumer_config(&config.brokers, &kafka)
        .set("enable.partition.eof", "true")
        .create();
    made.map_err(|error| {
        StartError::new(
            format!("preparing the Kafka consumer: {error}"),
            "correct brokers",
        )
    })
}

/// What there is to read of each partition: from the offset that the last replay committed, or from the first that is
/// still there, to the end.
fn spans(
    consumer: &StreamConsumer,
    topic: &str,
    all: bool,
) -> anyhow::Result<BTreeMap<i32, Range<i64>>> {
    let away = |error| {
        StartError::new(
            format!("reading {topic}: no broker answers: {error}"),
            "correct brokers, or try again",
        )
    };
    let metadata = consumer
        .fetch_metadata(Some(topic), BROKER_BOUND)
        .map_err(away)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let partitions = found.map_or(&[][..], |found| found.partitions());
    if partitions.is_empty() {
        let missing = format!("topic {topic} is missing");
        return Err(StartError::new(missing, "make it, or correct kafka.dead_letter_topic").into());
    }
    let mut asked = TopicPartitionList::new();
    for partition in partitions {
        asked.add_partition(topic, partition.id());
    }
    let committed = consumer
        .committed_offsets(asked, BROKER_BOUND)
        .map_err(away)?;
    let mut spans = BTreeMap::new();
    for element in committed.elements() {
        let id = element.partition();
        let (low, high) = consumer
            .fetch_watermarks(topic, id, BROKER_BOUND)
            .map_err(away)?;
        let done = match element.offset() {
            Offset::Offset(offset) if !all => offset,
            _ => low,
        };
        let span = done.clamp(low, high)..high;
        if !span.is_empty() {
            spans.insert(id, span);
        }
    }
    Ok(spans)
}

/// The next record that belongs to an open span. A span whose end is reached is closed; `None` says that one was, or that
/// what came is of no concern.
async fn next(
    consumer: &StreamConsumer,
    open: &mut BTreeMap<i32, Range<i64>>,
    bound: Duration,
) -> anyhow::Result<Option<OwnedMessage>> {
    let polled = tokio::time::timeout(bound, consumer.recv()).await;
    match polled.map_err(|_| anyhow::anyhow!("no dead letter came within {bound:?}"))? {
        Ok(message) => {
            let (partition, offset) = (message.partition(), message.offset());
            let Some(span) = open.get(&partition).cloned() else {
                return Ok(None);
            };
            if offset + 1 >= span.end {
                open.remove(&partition);
            }
            Ok(span.contains(&offset).then(|| message.detach()))
        }
        // what is missing at the end of a span was compacted or aborted
        Err(KafkaError::PartitionEOF(partition)) => {
            open.remove(&partition);
            Ok(None)
        }
        Err(error @ KafkaError::MessageConsumptionFatal(_)) => Err(error.into()),
        // a broker that cannot be reached just now; the bound above ends it
        Err(_) => Ok(None),
    }
}

/// Waits for a letter, then takes what is there already.
async fn take(
    consumer: &StreamConsumer,
    open: &mut BTreeMap<i32, Range<i64>>,
    most: usize,
) -> anyhow::Result<Vec<OwnedMessage>> {
    // as long as another member may take to be missed, and to be let in
    let bound = SESSION + BROKER_BOUND;
    let mut records = Vec::new();
    while records.is_empty() && !open.is_empty() {
        let came = next(consumer, open, bound).await;
        records.extend(came.context("another replay may be at work")?);
    }
    while records.len() < most && !open.is_empty() {
        match next(consumer, open, bound).now_or_never() {
            Some(came) => records.extend(came?),
            None => break,
        }
    }
    Ok(records)
}

/// Sends the letters, then commits how far they arrived.
async fn put_back(
    producer: &FutureProducer,
    consumer: &StreamConsumer,
    records: &[OwnedMessage],
    seen: &mut HashSet<Place>,
    replayed: &mut Replayed,
) -> anyhow::Result<()> {
    let mut reports = Vec::with_capacity(records.len());
    for record in records {
        let letter = DeadLetter::read(record);
        reports.push(match letter.origin.filter(|_| letter.omitted.is_none()) {
            Some(origin) if seen.insert(origin.clone()) => {
                Some(enqueue(producer, record, &origin)?)
            }
            Some(_) => {
                replayed.copies += 1;
                None
            }
            None => {
                replayed.left += 1;
                None
            }
        });
    }
    let mut done: BTreeMap<i32, &OwnedMessage> = BTreeMap::new();
    let mut failure = None;
    for (record, report) in records.iter().zip(reports) {
        if let Some(report) = report {
            if let Err((error, _)) = report.await.context("the producer went away")? {
                failure = Some(error);
                break;
            }
            replayed.put_back += 1;
        }
        done.insert(record.partition(), record);
    }
    commit(consumer, &done).context("commit what was put back, it may be put back once more")?;
    failure.map_or(Ok(()), |error| Err(error).context("put a dead letter back"))
}

fn enqueue(
    producer: &FutureProducer,
    record: &OwnedMessage,
    origin: &Place,
) -> anyhow::Result<DeliveryFuture> {
    let (timestamp, headers) = original(record);
    let mut again = FutureRecord::<[u8], [u8]>::to(&origin.topic)
        // where the order's other events are, whoever chose that
        .partition(origin.partition)
        .headers(headers);
    (again.key, again.payload, again.timestamp) = (record.key(), record.payload(), timestamp);
    let queued = producer.send_result(again);
    queued.map_err(|(error, _)| anyhow::Error::from(error).context("put a dead letter back"))
}

fn commit(consumer: &StreamConsumer, done: &BTreeMap<i32, &OwnedMessage>) -> anyhow::Result<()> {
    let mut offsets = TopicPartitionList::new();
    for (partition, last) in done {
        let next = Offset::Offset(last.offset() + 1);
        offsets.add_partition_offset(last.topic(), *partition, next)?;
    }
    if offsets.count() > 0 {
        consumer.commit(&offsets, CommitMode::Sync)?;
    }
    Ok(())
}

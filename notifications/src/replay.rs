//! Puts dead letters back where they were read, once their cause is mended: those that have a row
//! from there, then those that only the topic has, because their rows are gone or the release
//! before wrote no rows.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    time::Duration,
};

use anyhow::Context as _;
use platform::{
    kafka,
    pg::{self, Db, Pool},
};
use rdkafka::{
    Message as _, TopicPartitionList,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    message::{OwnedHeaders, OwnedMessage},
    producer::{DeliveryFuture, FutureProducer, FutureRecord},
    topic_partition_list::Offset,
};

use crate::{
    config::Config,
    letter::{
        Identity, KeptLetter, NO_TIME, Place, identity, is_whole, original,
        topic::{BROKER_BOUND, Spans, consumer, spans, take},
    },
    listing::{pool, rows_of},
    store::dead_letters as store,
};

/// Letters that are put back before that is written down: as many may be put back twice after a
/// crash.
const BATCH: usize = 100;
/// How long a letter is left to the replay that has it.
const CLAIM: Duration = Duration::from_secs(60);

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

/// Puts at most `limit` of the letters that wait back to their topics, each with its key, value,
/// headers and time, in its partition. Those that are still poison come back as new letters; they
/// wait for the next replay, not for this one.
///
/// # Errors
/// No broker or no database answers, or another replay is at work. What was acknowledged before
/// stays put back.
pub async fn replay(config: &Config, limit: u64) -> anyhow::Result<Replayed> {
    let consumer = consumer(config)?;
    // only what is there now: what comes back while we work would be put back for ever
    let open = spans(&consumer, &config.kafka.dead_letter_topic, false)?;
    let pool = pool(config).await?;
    let last = pool
        .with_connection(async |db: &mut Db| pg::Result::Ok(store::last_row(db).await?))
        .await?;
    let producer: FutureProducer = kafka::producer_config(&config.brokers, &config.kafka)
        .set("message.timeout.ms", BROKER_BOUND.as_millis().to_string())
        .create()
        .context("prepare the producer")?;
    let mut work = Work {
        pool,
        producer,
        limit,
        replayed: Replayed::default(),
    };
    work.put_rows_back(last).await?;
    if let Some(open) = open {
        let topic = &config.kafka.dead_letter_topic;
        work.put_the_topics_back(&consumer, topic, open).await?;
    }
    Ok(work.replayed)
}

struct Work {
    pool: Pool,
    producer: FutureProducer,
    /// Letters that may still be taken.
    limit: u64,
    replayed: Replayed,
}

impl Work {
    fn batch(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(BATCH).min(BATCH)
    }

    /// Rows up to `last`; two replays at once share them.
    async fn put_rows_back(&mut self, last: i64) -> anyhow::Result<()> {
        while self.limit > 0 {
            let most = self.batch() as i64;
            let claim = async |db: &mut Db| {
                let mut transaction = db.begin().await?;
                let seconds = CLAIM.as_secs_f64();
                let claimed =
                    store::claim_to_put_back(&mut transaction, seconds, last, most).await?;
                transaction.commit().await?;
                pg::Result::Ok(claimed)
            };
            let letters = self.pool.with_connection(claim).await?;
            if letters.is_empty() {
                break;
            }
            self.limit -= letters.len() as u64;
            self.put_claimed_back(&letters).await?;
        }
        Ok(())
    }

    async fn put_claimed_back(&mut self, letters: &[KeptLetter]) -> anyhow::Result<()> {
        let mut reports = Vec::with_capacity(letters.len());
        let mut failure = None;
        for letter in letters {
            let Identity { place, millis, .. } = &letter.identity;
            let time = (*millis != NO_TIME).then_some(*millis);
            let record = Again {
                key: letter.key.as_deref(),
                value: letter.value.as_deref(),
                headers: letter.headers.clone(),
                time,
            };
            match enqueue(&self.producer, record, place) {
                Ok(report) => reports.push(report),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let mut done = Vec::with_capacity(letters.len());
        for (letter, report) in letters.iter().zip(reports) {
            match report.await.context("the producer went away")? {
                Ok(_) => done.push(letter.id),
                Err((error, _)) => {
                    failure.get_or_insert(error.into());
                }
            }
        }
        let left: Vec<i64> = letters
            .iter()
            .map(|letter| letter.id)
            .filter(|id| !done.contains(id))
            .collect();
        let mark = async |db: &mut Db| {
            let mut transaction = db.begin().await?;
            store::mark_put_back(&mut transaction, &done).await?;
            store::release_put_back(&mut transaction, &left).await?;
            transaction.commit().await
        };
        self.pool
            .with_connection(mark)
            .await
            .context("note what was put back, it may be put back once more")?;
        self.replayed.put_back += done.len() as u64;
        failure.map_or(Ok(()), |error| Err(error.context("put a dead letter back")))
    }

    /// The letters of the topic that have no row; those that have one are passed over, their rows
    /// count.
    async fn put_the_topics_back(
        &mut self,
        consumer: &StreamConsumer,
        topic: &str,
        mut open: Spans,
    ) -> anyhow::Result<()> {
        if open.is_empty() || self.limit == 0 {
            return Ok(());
        }
        // a member of the group, not an assignment of our own: two replays at once share the
        // partitions
        consumer.subscribe(&[topic])?;
        let mut seen = HashSet::new();
        while self.limit > 0 && !open.is_empty() {
            let records = take(consumer, &mut open, self.batch()).await?;
            let rows = rows_of(&self.pool, &records).await?;
            let with_row = rows.iter().filter(|row| row.is_some()).count();
            self.limit -= (records.len() - with_row) as u64;
            let rowless: Vec<bool> = rows.iter().map(Option::is_none).collect();
            self.put_records_back(consumer, &records, &rowless, &mut seen)
                .await?;
        }
        Ok(())
    }

    /// Sends the letters, then commits how far they arrived.
    async fn put_records_back(
        &mut self,
        consumer: &StreamConsumer,
        records: &[OwnedMessage],
        rowless: &[bool],
        seen: &mut HashSet<Identity>,
    ) -> anyhow::Result<()> {
        let mut reports = Vec::with_capacity(records.len());
        for (record, rowless) in records.iter().zip(rowless) {
            reports.push(match identity(record).filter(|_| is_whole(record)) {
                _ if !rowless => None,
                Some(identity) if seen.insert(identity.clone()) => {
                    let (time, headers) = original(record);
                    let again = Again {
                        key: record.key(),
                        value: record.payload(),
                        headers,
                        time,
                    };
                    Some(enqueue(&self.producer, again, &identity.place)?)
                }
                Some(_) => {
                    self.replayed.copies += 1;
                    None
                }
                None => {
                    self.replayed.left += 1;
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
                self.replayed.put_back += 1;
            }
            done.insert(record.partition(), record);
        }
        commit(consumer, &done)
            .context("commit what was put back, it may be put back once more")?;
        failure.map_or(Ok(()), |error| Err(error).context("put a dead letter back"))
    }
}

/// A record as it was.
struct Again<'a> {
    key: Option<&'a [u8]>,
    value: Option<&'a [u8]>,
    headers: OwnedHeaders,
    time: Option<i64>,
}

fn enqueue(
    producer: &FutureProducer,
    record: Again<'_>,
    origin: &Place,
) -> anyhow::Result<DeliveryFuture> {
    let mut again = FutureRecord::<[u8], [u8]>::to(&origin.topic)
        // where the order's other events are, whoever chose that
        .partition(origin.partition)
        .headers(record.headers);
    (again.key, again.payload, again.timestamp) = (record.key, record.value, record.time);
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

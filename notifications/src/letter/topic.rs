//! The dead-letter topic as the commands read it. How far a replay went is kept in Kafka, as the
//! offsets of a consumer group of its own.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use anyhow::Context as _;
use futures::FutureExt as _;
use platform::{config::KafkaConfig, error::StartError, kafka};
use rdkafka::{
    Message as _, TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    error::KafkaError,
    message::OwnedMessage,
    topic_partition_list::Offset,
};

use super::headers;
use crate::config::Config;

/// Of the group whose offsets say which letters were put back: the service's own, and this.
const GROUP_SUFFIX: &str = ".dead-letters";
/// How long the broker may take for one answer.
pub(crate) const BROKER_BOUND: Duration = Duration::from_secs(5);
/// Of the group's members. A replay that was killed is in the way of the next one for so long;
/// Kafka allows no less.
const SESSION: Duration = Duration::from_secs(6);

/// What is still to be read, by partition.
pub(crate) type Spans = BTreeMap<i32, Range<i64>>;

pub(crate) fn consumer(config: &Config) -> Result<StreamConsumer, StartError> {
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

/// What there is to read of each partition: from the offset that the last replay committed, or from
/// the first that is still there, to the end. `None`: there is no such topic.
///
/// # Errors
/// No broker answers.
pub(crate) fn spans(
    consumer: &StreamConsumer,
    topic: &str,
    all: bool,
) -> Result<Option<Spans>, StartError> {
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
        return Ok(None);
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
    Ok(Some(spans))
}

/// The next record that belongs to an open span. A span whose end is reached is closed; `None` says
/// that one was, or that what came is of no concern.
pub(crate) async fn next(
    consumer: &StreamConsumer,
    open: &mut Spans,
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
            Ok(span.contains(&offset).then(|| headers::detach(&message)))
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
pub(crate) async fn take(
    consumer: &StreamConsumer,
    open: &mut Spans,
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

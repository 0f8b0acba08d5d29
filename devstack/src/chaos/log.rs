//! The log of the topic as a witness: every record from the first offset, and how far the consumers' group has got.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    ClientConfig, Message as _,
    consumer::{BaseConsumer, Consumer as _},
    topic_partition_list::{Offset, TopicPartitionList},
};
use serde::Deserialize;

use crate::stack::Stack;

/// Of one request to the broker, and of reading on while nothing comes.
const BOUND: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// A record of the topic, in the order of its partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub partition: i32,
    pub key: String,
    /// What is wrong with a value that cannot be read.
    pub event: Result<Event, String>,
}

/// What a value says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Event {
    #[serde(rename = "UserId")]
    pub user: i64,
    #[serde(rename = "OrderID")]
    pub order: i64,
    pub status: String,
    pub sequence: i64,
}

/// What Kafka has.
#[derive(Debug, Clone, Default)]
pub(super) struct Log {
    pub records: Vec<Record>,
    pub dead_letters: usize,
    /// Records that the broker has dropped, and that nobody can judge.
    pub dropped: i64,
}

/// Where the log is.
#[derive(Debug, Clone)]
pub(super) struct Topics {
    brokers: String,
    orders: String,
    dead_letters: String,
    group: String,
}

impl Topics {
    pub(super) fn of(stack: &Stack) -> Topics {
        let (orders, dead_letters, group) = stack.broker().names();
        Topics {
            brokers: stack.broker().brokers().join(","),
            orders: orders.to_owned(),
            dead_letters: dead_letters.to_owned(),
            group: group.to_owned(),
        }
    }

    /// Reads everything.
    pub(super) async fn read(self) -> Result<Log> {
        let reading = tokio::task::spawn_blocking(move || {
            let (records, dropped) = read(&self.consumer("recount")?, &self.orders)?;
            let (letters, _) = read(&self.consumer("recount")?, &self.dead_letters)?;
            anyhow::Ok(Log {
                records,
                dead_letters: letters.len(),
                dropped,
            })
        });
        reading.await.context("read the log")?
    }

    /// Records that the consumers' group has not committed yet.
    pub(super) async fn lag(self) -> Result<i64> {
        let asking = tokio::task::spawn_blocking(move || lag(&self));
        asking.await.context("ask for offsets")?
    }

    fn consumer(&self, group: &str) -> Result<BaseConsumer> {
        let consumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .create();
        consumer.context("prepare a consumer")
    }
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>> {
    let metadata = consumer.fetch_metadata(Some(topic), BOUND)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let partitions = found.map(|topic| topic.partitions().iter().map(|found| found.id()));
    let partitions: Vec<_> = partitions.into_iter().flatten().collect();
    ensure!(!partitions.is_empty(), "the topic {topic} is not there");
    Ok(partitions)
}

fn read(consumer: &BaseConsumer, topic: &str) -> Result<(Vec<Record>, i64)> {
    let (mut from, mut wanted, mut dropped) = (TopicPartitionList::new(), 0, 0);
    for partition in partitions(consumer, topic)? {
        let (low, high) = consumer.fetch_watermarks(topic, partition, BOUND)?;
        from.add_partition_offset(topic, partition, Offset::Beginning)?;
        wanted += high - low;
        dropped += low;
    }
    consumer.assign(&from)?;
    let mut records = Vec::new();
    let mut by = Instant::now() + BOUND;
    while (records.len() as i64) < wanted {
        let count = records.len();
        ensure!(
            Instant::now() < by,
            "read {count} of {wanted} records of {topic}"
        );
        // an error is a broker that is away for a moment; the bound above ends it
        if let Some(Ok(message)) = consumer.poll(POLL) {
            by = Instant::now() + BOUND;
            let value = message.payload().unwrap_or_default();
            records.push(Record {
                partition: message.partition(),
                key: String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned(),
                event: serde_json::from_slice(value).map_err(|error| error.to_string()),
            });
        }
    }
    Ok((records, dropped))
}

fn lag(topics: &Topics) -> Result<i64> {
    let consumer = topics.consumer(&topics.group)?;
    let mut wanted = TopicPartitionList::new();
    let mut ends = 0;
    for partition in partitions(&consumer, &topics.orders)? {
        let (_, high) = consumer.fetch_watermarks(&topics.orders, partition, BOUND)?;
        wanted.add_partition(&topics.orders, partition);
        ends += high;
    }
    let committed = consumer.committed_offsets(wanted, BOUND)?;
    let offset = |of: Offset| match of {
        Offset::Offset(offset) => offset,
        // nothing was committed there yet
        _ => 0,
    };
    let committed = committed.elements();
    let offsets = committed.iter().map(|element| offset(element.offset()));
    Ok(ends - offsets.sum::<i64>())
}

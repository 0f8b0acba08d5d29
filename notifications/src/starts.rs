//! Where reading begins. In a partition that was never read `kafka.start` says where, once: the
//! offset is written down and committed before anything of the partition is taken. After that a
//! committed offset that is missing, or that the partition has not, means the earliest: what was
//! read before is recognised, what was skipped would be lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
    time::Duration,
};

use anyhow::Context as _;
use platform::{
    grpc::registered,
    kafka::Start,
    pg::{self, Db, Pool},
};
use prometheus::IntCounter;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::KafkaResult,
    topic_partition_list::TopicPartitionListElem,
};

use crate::{assignment::Assignment, hand::Jump, store::starts as store};

/// How long the broker may take for an answer.
const BROKER_BOUND: Duration = Duration::from_secs(2);
/// What chose the offset that a group had already.
const COMMITTED: &str = "committed";

static LOST: LazyLock<IntCounter> = LazyLock::new(|| {
    registered(IntCounter::new(
        "notifications_counter_offsets_lost_total",
        "Times that reading went on elsewhere than it had come to: an offset was missing or out of range.",
    ))
});

/// Shows what is measured before there is anything to measure.
pub(crate) fn show_metrics() {
    LazyLock::force(&LOST);
}

/// What is written down about a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Where its reading began, or is to begin.
    pub offset: i64,
    /// Kafka had it.
    pub begun: bool,
}

/// Where the reading of a partition is to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub partition: i32,
    /// There.
    pub offset: i64,
    /// `kafka.start`, or the word for what the group had committed.
    pub by: String,
}

/// What Kafka says of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    committed: Option<i64>,
    /// The first offset that is there.
    low: i64,
    /// The one after the last.
    high: i64,
    /// What `kafka.start` comes to here.
    start: i64,
}

/// What that makes of its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beginning {
    /// Nobody has read it.
    First(i64),
    /// It goes on.
    Committed(i64),
    /// At the earliest, because the committed offset is missing or out of range.
    Lost(i64),
}

impl Beginning {
    fn of(facts: &Facts, recorded: Option<Recorded>) -> Beginning {
        match (facts.committed, recorded) {
            (Some(offset), _) if (facts.low..=facts.high).contains(&offset) => {
                Beginning::Committed(offset)
            }
            (None, None) => Beginning::First(facts.start),
            // a process ended between the table and Kafka
            (None, Some(Recorded { offset, begun })) if !begun => {
                Beginning::First(offset.clamp(facts.low, facts.high))
            }
            _ => Beginning::Lost(facts.low),
        }
    }

    fn offset(self) -> i64 {
        let (Beginning::First(offset) | Beginning::Committed(offset) | Beginning::Lost(offset)) =
            self;
        offset
    }
}

/// Sets the consumer to where the reading of `partitions` begins, and answers that; without those
/// that nobody answers for, one that has no leader say.
///
/// # Errors
/// The broker or the database does not answer, or the partitions went away: nothing of them may be
/// taken yet.
pub(crate) async fn begin(
    consumer: &Arc<StreamConsumer<Assignment>>,
    pool: &Pool,
    topic: &str,
    start: Start,
    partitions: &BTreeSet<i32>,
) -> anyhow::Result<BTreeMap<i32, i64>> {
    let ids: Vec<i32> = partitions.iter().copied().collect();
    let (asked, name, list) = (consumer.clone(), topic.to_owned(), ids.clone());
    // librdkafka's questions block, here and below
    let ask = move || ask(&asked, &name, start, &list);
    let (cluster, facts) = tokio::task::spawn_blocking(ask).await??;
    let record = async |db: &mut Db| -> pg::Result<BTreeMap<i32, Beginning>> {
        let mut transaction = db.begin().await?;
        let recorded = store::find_starts(&mut transaction, &cluster, topic, &ids).await?;
        let recorded: BTreeMap<i32, Recorded> = recorded.into_iter().collect();
        let of = |(partition, facts): (&i32, &Facts)| {
            let beginning = Beginning::of(facts, recorded.get(partition).copied());
            (*partition, beginning)
        };
        let beginnings: BTreeMap<i32, Beginning> = facts.iter().map(of).collect();
        let unknown = |(partition, _): &(&i32, &Beginning)| !recorded.contains_key(partition);
        let chosen: Vec<Chosen> = beginnings
            .iter()
            .filter(unknown)
            .map(|(partition, beginning)| Chosen {
                partition: *partition,
                offset: beginning.offset(),
                by: match beginning {
                    Beginning::First(_) => start.to_string(),
                    Beginning::Committed(_) | Beginning::Lost(_) => COMMITTED.to_owned(),
                },
            })
            .collect();
        store::insert_starts(&mut transaction, &cluster, topic, &chosen).await?;
        transaction.commit().await?;
        Ok(beginnings)
    };
    let beginnings = pool.with_connection(record).await?;
    let (set, name, list) = (consumer.clone(), topic.to_owned(), beginnings.clone());
    let set = move || seek(&set, &name, &list);
    tokio::task::spawn_blocking(set).await??;
    let mark = async |db: &mut Db| -> pg::Result<()> {
        let mut transaction = db.begin().await?;
        let begun: Vec<i32> = facts.keys().copied().collect();
        store::mark_begun(&mut transaction, &cluster, topic, &begun).await?;
        transaction.commit().await
    };
    pool.with_connection(mark).await?;
    for (partition, beginning) in &beginnings {
        say(topic, *partition, *beginning, facts.get(partition));
    }
    let offsets = beginnings.into_iter();
    Ok(offsets
        .map(|(partition, beginning)| (partition, beginning.offset()))
        .collect())
}

/// What Kafka says, and the id of its cluster.
fn ask(
    consumer: &StreamConsumer<Assignment>,
    topic: &str,
    start: Start,
    partitions: &[i32],
) -> anyhow::Result<(String, BTreeMap<i32, Facts>)> {
    let cluster = consumer.client().fetch_cluster_id(BROKER_BOUND);
    let cluster = cluster.context("no broker says which cluster this is")?;
    let mut asked = TopicPartitionList::new();
    for partition in partitions {
        asked.add_partition(topic, *partition);
    }
    let committed = consumer.committed_offsets(asked, BROKER_BOUND)?;
    let (mut facts, mut failed) = (BTreeMap::new(), None);
    for element in committed.elements() {
        let partition = element.partition();
        match facts_of(consumer, topic, start, &element) {
            Ok(found) => drop(facts.insert(partition, found)),
            Err(error) => failed = Some(error.context(format!("partition {partition}"))),
        }
    }
    match failed {
        Some(error) if facts.is_empty() => Err(error),
        _ => Ok((cluster, facts)),
    }
}

fn facts_of(
    consumer: &StreamConsumer<Assignment>,
    topic: &str,
    start: Start,
    committed: &TopicPartitionListElem<'_>,
) -> anyhow::Result<Facts> {
    committed.error()?;
    let partition = committed.partition();
    let (low, high) = consumer.fetch_watermarks(topic, partition, BROKER_BOUND)?;
    let committed = committed.offset().to_raw().filter(|offset| *offset >= 0);
    let start = match start {
        Start::Earliest => low,
        Start::Latest => high,
        Start::At(_) if committed.is_some() => low,
        Start::At(time) => {
            let millis = i64::try_from(time.unix_timestamp_nanos() / 1_000_000)?;
            offset_at(consumer, topic, partition, millis)?.unwrap_or(high)
        }
    };
    Ok(Facts {
        committed,
        low,
        high,
        start,
    })
}

/// The first record from that time on; none has come since.
fn offset_at(
    consumer: &StreamConsumer<Assignment>,
    topic: &str,
    partition: i32,
    millis: i64,
) -> KafkaResult<Option<i64>> {
    let mut asked = TopicPartitionList::new();
    asked.add_partition_offset(topic, partition, Offset::Offset(millis))?;
    let found = consumer.offsets_for_times(asked, BROKER_BOUND)?;
    Ok(found
        .elements()
        .first()
        .and_then(|element| match element.offset() {
            Offset::Offset(offset) if offset >= 0 => Some(offset),
            _ => None,
        }))
}

/// Commits where reading begins, where it is not committed, and goes there.
fn seek(
    consumer: &StreamConsumer<Assignment>,
    topic: &str,
    beginnings: &BTreeMap<i32, Beginning>,
) -> anyhow::Result<()> {
    let (mut uncommitted, mut all) = (TopicPartitionList::new(), TopicPartitionList::new());
    for (partition, beginning) in beginnings {
        let offset = Offset::Offset(beginning.offset());
        all.add_partition_offset(topic, *partition, offset)?;
        if !matches!(beginning, Beginning::Committed(_)) {
            uncommitted.add_partition_offset(topic, *partition, offset)?;
        }
    }
    if uncommitted.count() > 0 {
        consumer.commit(&uncommitted, CommitMode::Sync)?;
    }
    for element in consumer.seek_partitions(all, BROKER_BOUND)?.elements() {
        element.error()?;
    }
    Ok(())
}

fn say(topic: &str, partition: i32, beginning: Beginning, facts: Option<&Facts>) {
    match beginning {
        Beginning::Committed(_) => {}
        Beginning::First(offset) => {
            tracing::info!(
                kafka.topic = topic,
                kafka.partition = partition,
                kafka.offset = offset,
                "reading begins"
            );
        }
        Beginning::Lost(offset) => {
            let committed = facts.and_then(|facts| facts.committed);
            lost(topic, partition, committed, offset);
        }
    }
}

/// A record that follows its predecessor at a distance is nothing, a topic may be compacted or
/// written in transactions; one before it, or after records that are gone, is what librdkafka went
/// to when it found its offset out of range.
pub(crate) async fn explain(
    consumer: &Arc<StreamConsumer<Assignment>>,
    topic: &str,
    jumps: Vec<Jump>,
) {
    for jump in jumps {
        let (consumer, name) = (consumer.clone(), topic.to_owned());
        let ask = move || consumer.fetch_watermarks(&name, jump.partition, BROKER_BOUND);
        let is_lost = jump.offset < jump.expected
            || matches!(tokio::task::spawn_blocking(ask).await, Ok(Ok((low, _))) if low > jump.expected);
        if is_lost {
            let expected = Some(jump.expected);
            lost(topic, jump.partition, expected, jump.offset);
        }
    }
}

/// Says that reading goes on at `offset` instead of `expected`.
pub(crate) fn lost(topic: &str, partition: i32, expected: Option<i64>, offset: i64) {
    LOST.inc();
    tracing::error!(
        kafka.topic = topic,
        kafka.partition = partition,
        kafka.offset = offset,
        offset.expected = expected,
        "offset is missing or out of range, reading from the earliest"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_counts_once_and_after_that_the_earliest() {
        let begun = |begun: bool| Some(Recorded { offset: 7, begun });
        for (committed, recorded, expected) in [
            (None, None, Beginning::First(9)),
            (None, begun(false), Beginning::First(7)),
            (None, begun(true), Beginning::Lost(3)),
            (Some(5), None, Beginning::Committed(5)),
            (Some(5), begun(false), Beginning::Committed(5)),
            (Some(3), begun(true), Beginning::Committed(3)),
            (Some(10), begun(true), Beginning::Committed(10)),
            (Some(2), begun(true), Beginning::Lost(3)),
            (Some(11), begun(true), Beginning::Lost(3)),
            (Some(11), None, Beginning::Lost(3)),
        ] {
            let facts = Facts {
                committed,
                low: 3,
                high: 10,
                start: 9,
            };
            let found = Beginning::of(&facts, recorded);
            assert_eq!(found, expected, "{committed:?} {recorded:?}");
        }
    }
}

//! The partitions of a consumer: which come and go, and how far behind they are. The callbacks run inside the poll of the
//! one task that consumes, so nothing is in hand that the next look at `lost` does not reach.

use std::{
    collections::BTreeSet,
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use platform::{grpc::registered, state_log::StateLog};
use prometheus::{IntGauge, IntGaugeVec, Opts};
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance},
    error::{KafkaError, KafkaResult},
    types::RDKafkaRespErr,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long the broker may take for an answer; nothing is polled meanwhile.
const BROKER_BOUND: Duration = Duration::from_secs(1);

pub(crate) static OFFSETS: StateLog =
    StateLog::new("offsets not committed", "offsets are committed again");
static REBALANCES: StateLog = StateLog::new("rebalance failed", "partitions are assigned again");

/// Shows what is measured before there is anything to measure.
pub(crate) fn show_metrics() {
    LazyLock::force(&LAG);
    LazyLock::force(&PARTITIONS);
    LazyLock::force(&HELD);
}

static LAG: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_consumer_lag",
        "Records of a partition that this process consumes and has not committed yet.",
    );
    registered(IntGaugeVec::new(opts, &["partition"]))
});

static PARTITIONS: LazyLock<IntGauge> = LazyLock::new(|| {
    let help = "Partitions that this process consumes.";
    registered(IntGauge::new("notifications_consumer_partitions", help))
});

static HELD: LazyLock<IntGauge> = LazyLock::new(|| {
    let help = "Partitions that wait for room for their dead letters.";
    registered(IntGauge::new(
        "notifications_consumer_partitions_held",
        help,
    ))
});

/// The partitions of one consumer.
#[derive(Default)]
pub struct Assignment {
    owned: Mutex<BTreeSet<i32>>,
    lost: Mutex<Vec<i32>>,
    paused: AtomicBool,
    /// Paused by themselves.
    held: Mutex<BTreeSet<i32>>,
    /// Ours, and nothing of them is taken until it is settled where their reading begins.
    arrived: Mutex<BTreeSet<i32>>,
    arrival: Notify,
}

impl Assignment {
    /// The partitions that went away since this was last asked.
    pub fn take_lost(&self) -> Vec<i32> {
        std::mem::take(&mut self.lost.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks the broker how far each partition is behind, and shows it. Not taken from librdkafka's statistics: they know no
    /// lag before the first commit and none that grows while a partition is paused, and that is when somebody looks.
    /// Blocks, at most `bound` for a question; once `ended`, no partition more is asked about, because on a connection that
    /// waits for records each answer may take half a second.
    ///
    /// # Errors
    /// The first of a broker that does not answer. One partition that fails, without a leader say, leaves the others to be
    /// asked about; itself it shows what it showed.
    pub fn measure(
        &self,
        consumer: &impl Consumer<Assignment>,
        bound: Duration,
        ended: &CancellationToken,
    ) -> KafkaResult<()> {
        let mut failure = None;
        for element in consumer.committed(bound)?.elements() {
            if ended.is_cancelled() {
                break;
            }
            let partition = element.partition();
            let asked = consumer.fetch_watermarks(element.topic(), partition, bound);
            let (first, end) = match asked {
                Ok(watermarks) => watermarks,
                Err(error) => {
                    failure.get_or_insert(error);
                    continue;
                }
            };
            let next = match element.offset() {
                Offset::Offset(offset) => offset.max(first),
                _ => first,
            };
            // under the lock, so that a partition that goes now does not come back to the gauge
            let owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
            if owned.contains(&partition) {
                LAG.with_label_values(&[&partition.to_string()])
                    .set((end - next).max(0));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Stops what comes in, from partitions that arrive later too.
    pub fn pause(&self, consumer: &impl Consumer<Assignment>) -> KafkaResult<()> {
        self.paused.store(true, Ordering::SeqCst);
        consumer.pause(&consumer.assignment()?)
    }

    /// Lets in again what is not held and has begun.
    pub fn resume(&self, consumer: &impl Consumer<Assignment>) -> KafkaResult<()> {
        self.paused.store(false, Ordering::SeqCst);
        let (held, arrived) = (self.held(), self.arrived());
        let free = |partition| !held.contains(&partition) && !arrived.contains(&partition);
        consumer.resume(&some(&consumer.assignment()?, free))
    }

    /// Ends with the arrival of partitions.
    pub async fn arrival(&self) {
        self.arrival.notified().await;
    }

    /// What has come and not begun.
    pub fn arrived(&self) -> BTreeSet<i32> {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.clone()
    }

    /// Whether that one has.
    pub fn has_arrived(&self, partition: i32) -> bool {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.contains(&partition)
    }

    /// Lets in what has begun now.
    ///
    /// # Errors
    /// librdkafka's; they have not begun.
    pub fn begun(
        &self,
        consumer: &impl Consumer<Assignment>,
        partitions: impl Fn(i32) -> bool,
    ) -> KafkaResult<()> {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        // while everything is paused, the end of that lets them in
        if !self.paused.load(Ordering::SeqCst) {
            let began = |partition| arrived.contains(&partition) && partitions(partition);
            consumer.resume(&some(&consumer.assignment()?, began))?;
        }
        arrived.retain(|partition| !partitions(*partition));
        Ok(())
    }

    fn held(&self) -> BTreeSet<i32> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone()
    }

    /// Stops what comes in from these partitions, and lets in what was held before and is not now.
    ///
    /// # Errors
    /// librdkafka's; what was held stays held.
    pub fn hold(
        &self,
        consumer: &impl Consumer<Assignment>,
        partitions: BTreeSet<i32>,
    ) -> KafkaResult<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == partitions {
            return Ok(());
        }
        let ours = consumer.assignment()?;
        consumer.pause(&some(&ours, |partition| partitions.contains(&partition)))?;
        // while everything is paused, the end of that lets them in
        if !self.paused.load(Ordering::SeqCst) {
            let freed = |partition| held.contains(&partition) && !partitions.contains(&partition);
            consumer.resume(&some(&ours, freed))?;
        }
        HELD.set(partitions.len() as i64);
        *held = partitions;
        Ok(())
    }
}

impl ClientContext for Assignment {}

impl ConsumerContext for Assignment {
    /// As rdkafka does it, but that each partition is assigned with an offset. Without one
    /// librdkafka asks for the earliest, and asks once more if it was sent elsewhere meanwhile
    /// (seen: it then reads from the earliest after all).
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        code: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let assigned = match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                if let Err(error) = place(consumer, partitions) {
                    tracing::debug!(error = %error, "partitions assigned without offsets");
                }
                let assigned = consumer.assign(partitions);
                self.post_rebalance(consumer, &Rebalance::Assign(partitions));
                assigned
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => {
                self.pre_rebalance(consumer, &Rebalance::Revoke(partitions));
                consumer.unassign()
            }
            code => {
                let error = KafkaError::Rebalance(code.into());
                self.post_rebalance(consumer, &Rebalance::Error(error));
                consumer.unassign()
            }
        };
        if let Err(error) = assigned {
            REBALANCES.failed(&error);
        }
    }

    fn pre_rebalance(&self, _consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            let ids = ids(partitions);
            tracing::info!(partitions = ?ids, "partitions revoked");
            let mut owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
            for id in &ids {
                owned.remove(id);
                // the gauge belongs to whoever has the partition now
                let _ = LAG.remove_label_values(&[&id.to_string()]);
            }
            PARTITIONS.set(owned.len() as i64);
            drop(owned);
            // whoever has it next finds out by itself
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.retain(|partition| !ids.contains(partition));
            HELD.set(held.len() as i64);
            drop(held);
            let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            arrived.retain(|partition| !ids.contains(partition));
            drop(arrived);
            self.lost
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(ids);
        }
    }

    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(partitions) => {
                REBALANCES.works();
                let ids = ids(partitions);
                tracing::info!(partitions = ?ids, "partitions assigned");
                let mut owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
                owned.extend(&ids);
                PARTITIONS.set(owned.len() as i64);
                drop(owned);
                if let Err(error) = consumer.pause(partitions) {
                    tracing::warn!(error = %error, "partitions not paused");
                }
                let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
                arrived.extend(&ids);
                self.arrival.notify_one();
            }
            Rebalance::Revoke(_) => {}
            Rebalance::Error(error) => REBALANCES.failed(error),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        match result {
            Ok(()) => OFFSETS.works(),
            // they will be read, and recognised, again
            Err(error) => OFFSETS.failed(&error),
        }
    }
}

/// Gives each partition the offset that its group has committed, or else the first that is there.
fn place(
    consumer: &BaseConsumer<Assignment>,
    partitions: &mut TopicPartitionList,
) -> KafkaResult<()> {
    let committed = consumer.committed_offsets(partitions.clone(), BROKER_BOUND)?;
    for element in committed.elements() {
        let (topic, partition) = (element.topic(), element.partition());
        let (low, high) = consumer.fetch_watermarks(topic, partition, BROKER_BOUND)?;
        let offset = match element.offset() {
            Offset::Offset(offset) if (low..=high).contains(&offset) => offset,
            _ => low,
        };
        partitions.set_partition_offset(topic, partition, Offset::Offset(offset))?;
    }
    Ok(())
}

fn some(partitions: &TopicPartitionList, wanted: impl Fn(i32) -> bool) -> TopicPartitionList {
    let mut some = TopicPartitionList::new();
    for element in partitions.elements() {
        if wanted(element.partition()) {
            some.add_partition(element.topic(), element.partition());
        }
    }
    some
}

fn ids(partitions: &TopicPartitionList) -> Vec<i32> {
    partitions
        .elements()
        .iter()
        .map(|element| element.partition())
        .collect()
}

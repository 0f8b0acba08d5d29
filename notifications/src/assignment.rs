//! What librdkafka tells a consumer while it polls: partitions that come and go, and how far behind it is. The callbacks
//! run inside the poll of the one task that consumes, so nothing is in hand that the next look at `lost` does not reach.

use std::sync::{
    LazyLock, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use platform::grpc::registered;
use prometheus::{IntGauge, IntGaugeVec, Opts};
use rdkafka::{
    ClientContext, Statistics, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance},
    error::KafkaResult,
};

static LAG: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_consumer_lag",
        "Records of a partition that this process has not consumed yet.",
    );
    registered(IntGaugeVec::new(opts, &["partition"]))
});

static PARTITIONS: LazyLock<IntGauge> = LazyLock::new(|| {
    let help = "Partitions that this process consumes.";
    registered(IntGauge::new("notifications_consumer_partitions", help))
});

/// The partitions of one consumer.
#[derive(Default)]
pub struct Assignment {
    lost: Mutex<Vec<i32>>,
    paused: AtomicBool,
}

impl Assignment {
    /// The partitions that went away since this was last asked.
    pub fn take_lost(&self) -> Vec<i32> {
        std::mem::take(&mut self.lost.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops what comes in, from partitions that arrive later too.
    pub fn pause(&self, consumer: &impl Consumer<Assignment>) -> KafkaResult<()> {
        self.paused.store(true, Ordering::SeqCst);
        consumer.pause(&consumer.assignment()?)
    }

    /// Lets everything in again.
    pub fn resume(&self, consumer: &impl Consumer<Assignment>) -> KafkaResult<()> {
        self.paused.store(false, Ordering::SeqCst);
        consumer.resume(&consumer.assignment()?)
    }
}

impl ClientContext for Assignment {
    fn stats(&self, statistics: Statistics) {
        for topic in statistics.topics.values() {
            for (id, partition) in &topic.partitions {
                // -1: not ours, or not known yet
                if *id >= 0 && partition.consumer_lag >= 0 {
                    LAG.with_label_values(&[&id.to_string()])
                        .set(partition.consumer_lag);
                }
            }
        }
    }
}

impl ConsumerContext for Assignment {
    fn pre_rebalance(&self, _consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            let ids = ids(partitions);
            PARTITIONS.sub(ids.len() as i64);
            tracing::info!(partitions = ?ids, "partitions revoked");
            for id in &ids {
                // the gauge belongs to whoever has the partition now
                let _ = LAG.remove_label_values(&[&id.to_string()]);
            }
            self.lost
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(ids);
        }
    }

    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(partitions) => {
                let ids = ids(partitions);
                PARTITIONS.add(ids.len() as i64);
                tracing::info!(partitions = ?ids, "partitions assigned");
                if self.paused.load(Ordering::SeqCst)
                    && let Err(error) = consumer.pause(partitions)
                {
                    tracing::warn!(error = %error, "partitions not paused");
                }
            }
            Rebalance::Revoke(_) => {}
            Rebalance::Error(error) => tracing::warn!(error = %error, "rebalance failed"),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            // they will be read, and recognised, again
            tracing::warn!(error = %error, "offsets not committed");
        }
    }
}

fn ids(partitions: &TopicPartitionList) -> Vec<i32> {
    partitions
        .elements()
        .iter()
        .map(|element| element.partition())
        .collect()
}

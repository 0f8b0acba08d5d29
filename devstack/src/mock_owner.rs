//! The child process that holds librdkafka's mock cluster. A process of its own, because the cluster's sockets survive an
//! exec: a service that is started beside them would inherit the ends of connections, and when the cluster closes those,
//! whoever is at the other end would never hear of it.

use anyhow::{Context as _, Result};
use rdkafka::{error::KafkaResult, mocking::MockCluster, producer::DefaultProducerContext};
use serde::{Deserialize, Serialize};

use crate::owner::{Owned, obey};

/// As many brokers as a replication factor of 3 asks for.
const BROKERS: i32 = 3;
/// The mock keeps 5 MiB a partition and drops the oldest silently: many partitions keep more.
const PARTITIONS: i32 = 32;

/// What the owner says on its stdout when the brokers answer.
#[derive(Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) brokers: String,
}

/// Runs until stdin ends. What is in the log is gone then.
pub fn run(orders: &str, dead_letters: &str) -> Result<()> {
    let cluster = MockCluster::new(BROKERS).context("start the mock cluster")?;
    for (topic, partitions) in [(orders, PARTITIONS), (dead_letters, 1)] {
        let created = cluster.create_topic(topic, partitions, BROKERS);
        created.with_context(|| format!("create topic {topic}"))?;
    }
    let started = Started {
        brokers: cluster.bootstrap_servers(),
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(obey(&mut Mock(cluster), &started));
    // the thread that reads stdin may still wait there
    runtime.shutdown_background();
    outcome
}

struct Mock(MockCluster<'static, DefaultProducerContext>);

impl Mock {
    fn each(&self, switch: impl Fn(i32) -> KafkaResult<()>) -> Result<()> {
        (1..=BROKERS)
            .try_for_each(switch)
            .context("switch the mock cluster")
    }
}

impl Owned for Mock {
    /// The brokers close their connections and accept none; the log stays.
    async fn crash(&mut self) -> Result<()> {
        self.each(|broker| self.0.broker_down(broker))
    }

    async fn recover(&mut self) -> Result<()> {
        self.each(|broker| self.0.broker_up(broker))
    }
}

//! The Kafka of a run: librdkafka's mock cluster in this process, or the cluster in `KAFKA_BROKERS`. Topics are made here,
//! because services never make any; on a cluster that outlives us they carry the run's name and are deleted at the end.

use std::{sync::mpsc, thread, time::Duration};

use anyhow::{Context as _, Result};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    mocking::MockCluster,
};
use serde_json::json;

use crate::failure::Misuse;

/// As many brokers as a replication factor of 3 asks for.
const MOCK_BROKERS: i32 = 3;
/// The mock keeps 5 MiB a partition and drops the oldest silently: many partitions keep more.
const MOCK_PARTITIONS: i32 = 32;
/// What production has.
const PARTITIONS: i32 = 12;
const ADMIN_BOUND: Duration = Duration::from_secs(10);
/// A consumer that died is replaced after this long; the mock makes a second member wait for nearly all of it.
const SESSION_TIMEOUT: &str = "6s";

/// Brokers with the two topics of a run.
pub struct Broker {
    brokers: Vec<String>,
    orders: String,
    dead_letters: String,
    group: String,
    kind: Kind,
}

enum Kind {
    /// Dropping the sender ends the thread that holds the cluster, which cannot move between threads.
    Mock(#[expect(dead_code, reason = "held for its drop")] mpsc::Sender<()>),
    Cluster(AdminClient<DefaultClientContext>),
}

impl Broker {
    /// Starts or finds the brokers and makes the topics of the run called `run`.
    pub async fn start(run: &str) -> Result<Broker> {
        match std::env::var("KAFKA_BROKERS")
            .ok()
            .filter(|brokers| !brokers.is_empty())
        {
            Some(brokers) => Broker::cluster(&brokers, run).await,
            None => Broker::mock(),
        }
    }

    fn mock() -> Result<Broker> {
        let (orders, dead_letters) = ("orders".to_owned(), "orders.dlq".to_owned());
        let topics = [(orders.clone(), MOCK_PARTITIONS), (dead_letters.clone(), 1)];
        let (hold, released) = mpsc::channel::<()>();
        let (send, started) = mpsc::channel();
        thread::Builder::new()
            .name("mock kafka".to_owned())
            .spawn(move || {
                let cluster = MockCluster::new(MOCK_BROKERS).and_then(|cluster| {
                    topics.iter().try_for_each(|(topic, partitions)| {
                        cluster.create_topic(topic, *partitions, MOCK_BROKERS)
                    })?;
                    Ok(cluster)
                });
                // the receiver waits below; nothing else can be done with an error here
                let _ = send.send(
                    cluster
                        .as_ref()
                        .map(MockCluster::bootstrap_servers)
                        .map_err(Clone::clone),
                );
                let _ = released.recv();
            })?;
        let bootstrap = started
            .recv()
            .context("the mock cluster's thread ended")?
            .context("start the mock cluster")?;
        let brokers = bootstrap.split(',').map(str::to_owned).collect();
        Ok(Broker {
            brokers,
            orders,
            dead_letters,
            group: "notifications".to_owned(),
            kind: Kind::Mock(hold),
        })
    }

    async fn cluster(brokers: &str, run: &str) -> Result<Broker> {
        let (orders, dead_letters) = (format!("orders-{run}"), format!("orders-{run}.dlq"));
        let admin: AdminClient<_> = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .create()?;
        let topics = [
            NewTopic::new(&orders, PARTITIONS, TopicReplication::Fixed(-1)),
            NewTopic::new(&dead_letters, 1, TopicReplication::Fixed(-1)),
        ];
        let made = admin.create_topics(&topics, &admin_options()).await;
        let remedy = "correct KAFKA_BROKERS, or unset it for a broker in this process";
        for result in made.map_err(|error| {
            Misuse::error(format!("creating topics at {brokers}: {error}"), remedy)
        })? {
            result.map_err(|(topic, code)| {
                Misuse::error(
                    format!("creating topic {topic} at {brokers}: {code}"),
                    remedy,
                )
            })?;
        }
        let brokers = brokers.split(',').map(str::to_owned).collect();
        Ok(Broker {
            brokers,
            orders,
            dead_letters,
            group: format!("notifications-{run}"),
            kind: Kind::Cluster(admin),
        })
    }

    /// `host:port` of each broker.
    pub fn brokers(&self) -> &[String] {
        &self.brokers
    }

    /// The `kafka` section of a service's configuration.
    pub fn section(&self) -> serde_json::Value {
        json!({
            "topic": self.orders,
            "dead_letter_topic": self.dead_letters,
            "group": self.group,
            "session_timeout": SESSION_TIMEOUT,
        })
    }

    /// Whose it is, for people.
    pub fn description(&self) -> &'static str {
        match self.kind {
            Kind::Mock(_) => "embedded broker that speaks the Kafka protocol",
            Kind::Cluster(_) => "Kafka in KAFKA_BROKERS",
        }
    }

    /// Deletes the topics from a cluster that outlives us.
    pub async fn stop(self) -> Result<()> {
        if let Kind::Cluster(admin) = &self.kind {
            let topics = [self.orders.as_str(), self.dead_letters.as_str()];
            admin
                .delete_topics(&topics, &admin_options())
                .await
                .context("delete the topics")?;
        }
        Ok(())
    }
}

fn admin_options() -> AdminOptions {
    AdminOptions::new()
        .operation_timeout(Some(ADMIN_BOUND))
        .request_timeout(Some(ADMIN_BOUND))
}

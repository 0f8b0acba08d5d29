//! The Kafka of a run: librdkafka's mock cluster in this process, an Apache Kafka of our own, or the cluster in
//! `KAFKA_BROKERS`. Topics are made here, because services never make any; on a cluster that outlives us they carry the
//! run's name and are deleted at the end. What is ours can be taken away for a while.

use std::{path::Path, sync::mpsc, thread, time::Duration};

use anyhow::{Context as _, Result, bail};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::KafkaResult,
    mocking::MockCluster,
};
use serde_json::json;

use crate::{
    failure::Misuse,
    kafka::{Kafka, Tools},
};

/// As many brokers as a replication factor of 3 asks for.
const MOCK_BROKERS: i32 = 3;
/// The mock keeps 5 MiB a partition and drops the oldest silently: many partitions keep more.
const MOCK_PARTITIONS: i32 = 32;
/// What production has.
const PARTITIONS: i32 = 12;
const ADMIN_BOUND: Duration = Duration::from_secs(10);
/// A consumer that died is replaced after this long; the mock makes a second member wait for nearly all of it.
const SESSION_TIMEOUT: &str = "6s";

/// Which brokers a run uses.
#[derive(Debug, Clone)]
pub enum Source {
    /// Those in `KAFKA_BROKERS`, or the mock cluster.
    Environment,
    /// The mock cluster whatever `KAFKA_BROKERS` says, because it will be taken away.
    Mock,
    /// An Apache Kafka of its own.
    Own(Tools),
}

/// Brokers with the two topics of a run.
pub struct Broker {
    brokers: Vec<String>,
    orders: String,
    dead_letters: String,
    group: String,
    kind: Kind,
}

enum Kind {
    /// The way to the thread that holds the cluster, which cannot move between threads; closed, the thread ends.
    Mock(mpsc::Sender<Switch>),
    Own(Box<Kafka>),
    Cluster(AdminClient<DefaultClientContext>),
}

/// Takes the mock's brokers away or brings them back, and where the outcome goes.
struct Switch {
    up: bool,
    done: mpsc::Sender<KafkaResult<()>>,
}

impl Broker {
    /// Starts or finds the brokers of `source` and makes the topics of the run called `run`.
    pub async fn start(source: &Source, devstack: &Path, run: &str) -> Result<Broker> {
        let given = std::env::var("KAFKA_BROKERS").ok();
        match (source, given.filter(|brokers| !brokers.is_empty())) {
            (Source::Environment, Some(brokers)) => Broker::cluster(brokers, run).await,
            (Source::Environment, None) | (Source::Mock, _) => Broker::mock(),
            (Source::Own(tools), _) => {
                let kafka = Kafka::start(devstack, tools).await?;
                let brokers = kafka.address();
                let topics = ("orders".to_owned(), "orders.dlq".to_owned());
                create_topics(&admin(&brokers)?, &brokers, &topics).await?;
                Ok(Broker {
                    brokers: vec![brokers],
                    orders: topics.0,
                    dead_letters: topics.1,
                    group: "notifications".to_owned(),
                    kind: Kind::Own(Box::new(kafka)),
                })
            }
        }
    }

    fn mock() -> Result<Broker> {
        let (orders, dead_letters) = ("orders".to_owned(), "orders.dlq".to_owned());
        let topics = [(orders.clone(), MOCK_PARTITIONS), (dead_letters.clone(), 1)];
        let (switch, switches) = mpsc::channel::<Switch>();
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
                if let Ok(cluster) = cluster {
                    obey(&cluster, &switches);
                }
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
            kind: Kind::Mock(switch),
        })
    }

    async fn cluster(brokers: String, run: &str) -> Result<Broker> {
        let admin = admin(&brokers)?;
        let topics = (format!("orders-{run}"), format!("orders-{run}.dlq"));
        create_topics(&admin, &brokers, &topics).await?;
        Ok(Broker {
            brokers: brokers.split(',').map(str::to_owned).collect(),
            orders: topics.0,
            dead_letters: topics.1,
            group: format!("notifications-{run}"),
            kind: Kind::Cluster(admin),
        })
    }

    /// Takes the brokers away: Apache Kafka is killed, the mock's brokers close their connections and accept none.
    pub async fn take_away(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Mock(switch) => flip(switch, false),
            Kind::Own(kafka) => kafka.crash().await,
            Kind::Cluster(_) => bail!("brokers that are not ours cannot be taken away"),
        }
    }

    /// Brings them back, with all that they had acknowledged.
    pub async fn bring_back(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Mock(switch) => flip(switch, true),
            Kind::Own(kafka) => kafka.recover().await,
            Kind::Cluster(_) => Ok(()),
        }
    }

    /// The topic of events, the topic of dead letters and the consumers' group.
    pub fn names(&self) -> (&str, &str, &str) {
        (&self.orders, &self.dead_letters, &self.group)
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
            Kind::Own(_) => "Apache Kafka of its own",
            Kind::Cluster(_) => "Kafka in KAFKA_BROKERS",
        }
    }

    /// Deletes the topics from a cluster that outlives us, stops what is ours.
    pub async fn stop(self) -> Result<()> {
        match self.kind {
            Kind::Mock(_) => Ok(()),
            Kind::Own(kafka) => kafka.stop().await,
            Kind::Cluster(admin) => {
                let topics = [self.orders.as_str(), self.dead_letters.as_str()];
                let deleted = admin.delete_topics(&topics, &admin_options()).await;
                deleted.map(drop).context("delete the topics")
            }
        }
    }
}

/// The mock's thread, until the way to it is closed.
fn obey(cluster: &MockCluster<'_, impl rdkafka::ClientContext>, switches: &mpsc::Receiver<Switch>) {
    for Switch { up, done } in switches {
        let switched = (1..=MOCK_BROKERS).try_for_each(|broker| match up {
            true => cluster.broker_up(broker),
            false => cluster.broker_down(broker),
        });
        // whoever asked may have been interrupted
        let _ = done.send(switched);
    }
}

fn flip(switch: &mpsc::Sender<Switch>, up: bool) -> Result<()> {
    let (done, outcome) = mpsc::channel();
    let gone = "the mock cluster's thread ended";
    switch.send(Switch { up, done }).ok().context(gone)?;
    outcome
        .recv()
        .context(gone)?
        .context("switch the mock cluster")
}

fn admin(brokers: &str) -> Result<AdminClient<DefaultClientContext>> {
    let admin = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create();
    admin.context("prepare an administrator of Kafka")
}

async fn create_topics(
    admin: &AdminClient<DefaultClientContext>,
    brokers: &str,
    (orders, dead_letters): &(String, String),
) -> Result<()> {
    let topics = [
        NewTopic::new(orders, PARTITIONS, TopicReplication::Fixed(-1)),
        NewTopic::new(dead_letters, 1, TopicReplication::Fixed(-1)),
    ];
    let remedy = "correct KAFKA_BROKERS, or unset it for a broker in this process";
    let made = admin.create_topics(&topics, &admin_options()).await;
    for result in made
        .map_err(|error| Misuse::error(format!("creating topics at {brokers}: {error}"), remedy))?
    {
        result.map_err(|(topic, code)| {
            Misuse::error(
                format!("creating topic {topic} at {brokers}: {code}"),
                remedy,
            )
        })?;
    }
    Ok(())
}

fn admin_options() -> AdminOptions {
    AdminOptions::new()
        .operation_timeout(Some(ADMIN_BOUND))
        .request_timeout(Some(ADMIN_BOUND))
}

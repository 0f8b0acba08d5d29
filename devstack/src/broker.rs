//! The Kafka of a run: librdkafka's mock cluster, an Apache Kafka of our own, or the cluster in
//! `KAFKA_BROKERS`. Topics are made here, because services never make any; on a cluster that outlives us they carry the
//! run's name and are deleted at the end. What is ours can be taken away for a while.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use serde_json::json;
use tokio::process::Command;

use crate::{
    failure::Misuse,
    kafka::{Kafka, Tools},
    mock_owner,
    owner::Owner,
};

/// What production has.
const PARTITIONS: i32 = 12;
const ADMIN_BOUND: Duration = Duration::from_secs(10);
/// The mock starts in milliseconds, its process on a busy machine in seconds.
const MOCK_BOUND: Duration = Duration::from_secs(30);
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
    Mock(Box<Owner>),
    Own(Box<Kafka>),
    Cluster(AdminClient<DefaultClientContext>),
}

impl Broker {
    /// Starts or finds the brokers of `source` and makes the topics of the run called `run`.
    pub async fn start(source: &Source, devstack: &Path, run: &str) -> Result<Broker> {
        let given = std::env::var("KAFKA_BROKERS").ok();
        match (source, given.filter(|brokers| !brokers.is_empty())) {
            (Source::Environment, Some(brokers)) => Broker::cluster(brokers, run).await,
            (Source::Environment, None) | (Source::Mock, _) => Broker::mock(devstack).await,
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

    async fn mock(devstack: &Path) -> Result<Broker> {
        let (orders, dead_letters) = ("orders".to_owned(), "orders.dlq".to_owned());
        let mut command = Command::new(devstack);
        command.args(["mock-owner", &orders, &dead_letters]);
        let (owner, started): (_, mock_owner::Started) =
            Owner::spawn("the mock cluster", command, MOCK_BOUND).await?;
        Ok(Broker {
            brokers: started.brokers.split(',').map(str::to_owned).collect(),
            orders,
            dead_letters,
            group: "notifications".to_owned(),
            kind: Kind::Mock(Box::new(owner)),
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
            Kind::Mock(owner) => owner.crash().await,
            Kind::Own(kafka) => kafka.crash().await,
            Kind::Cluster(_) => bail!("brokers that are not ours cannot be taken away"),
        }
    }

    /// Brings them back, with all that they had acknowledged.
    pub async fn bring_back(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Mock(owner) => owner.recover().await,
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
            Kind::Mock(owner) => owner.stop(MOCK_BOUND).await,
            Kind::Own(kafka) => kafka.stop().await,
            Kind::Cluster(admin) => {
                let topics = [self.orders.as_str(), self.dead_letters.as_str()];
                let deleted = admin.delete_topics(&topics, &admin_options()).await;
                deleted.map(drop).context("delete the topics")
            }
        }
    }
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
    let remedy = "correct KAFKA_BROKERS, or unset it for an embedded broker";
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

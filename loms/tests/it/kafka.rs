//! The broker of the tests: librdkafka's mock cluster, one for the process, or the cluster that `KAFKA_BROKERS` names.
//! Every test has a topic of its own.

use std::{
    sync::{LazyLock, mpsc},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    mocking::MockCluster,
    topic_partition_list::{Offset, TopicPartitionList},
};
use serde_json::Value;

const PARTITIONS: i32 = 4;

/// The mock cluster cannot leave its thread: topics are asked of it there.
struct Mock {
    brokers: String,
    create: mpsc::Sender<(String, mpsc::Sender<()>)>,
}

static MOCK: LazyLock<Mock> = LazyLock::new(|| {
    let (create, creations) = mpsc::channel::<(String, mpsc::Sender<()>)>();
    let (started, start) = mpsc::channel();
    std::thread::spawn(move || {
        let cluster = MockCluster::new(1).expect("a mock cluster");
        started
            .send(cluster.bootstrap_servers())
            .expect("the test waits");
        for (topic, done) in creations {
            cluster
                .create_topic(&topic, PARTITIONS, 1)
                .expect("a topic");
            done.send(()).expect("the test waits");
        }
    });
    Mock {
        brokers: start.recv().expect("a broker"),
        create,
    }
});

/// `host:port` of the brokers.
pub(crate) fn brokers() -> String {
    std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| MOCK.brokers.clone())
}

pub(crate) fn unused_topic() -> String {
    format!("orders-{}", uuid::Uuid::new_v4().simple())
}

pub(crate) async fn create_topic(topic: &str) {
    if std::env::var("KAFKA_BROKERS").is_err() {
        let (done, created) = mpsc::channel();
        MOCK.create
            .send((topic.to_owned(), done))
            .expect("the mock runs");
        return created.recv().expect("a topic");
    }
    let admin: AdminClient<DefaultClientContext> = client().create().expect("an admin");
    let topic = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
    let results = admin
        .create_topics([&topic], &AdminOptions::new())
        .await
        .expect("an answer");
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

/// A record of the log, as a consumer sees it.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) partition: i32,
    pub(crate) key: String,
    pub(crate) text: String,
    pub(crate) value: Value,
    pub(crate) traceparent: Option<String>,
}

/// The whole log of a topic, in order within each partition.
pub(crate) async fn read_log(topic: &str) -> Vec<Event> {
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || read(&topic))
        .await
        .expect("a log")
}

fn read(topic: &str) -> Vec<Event> {
    let consumer: BaseConsumer = client()
        .set("group.id", "oracle")
        .set("enable.auto.commit", "false")
        .create()
        .expect("a consumer");
    let (mut from, mut expected) = (TopicPartitionList::new(), 0);
    for partition in 0..PARTITIONS {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, Duration::from_secs(10))
            .expect("watermarks");
        // the mock drops the oldest when a partition is full: then it is no witness
        assert_eq!(low, 0, "the log has lost its beginning");
        from.add_partition_offset(topic, partition, Offset::Beginning)
            .expect("an offset");
        expected += usize::try_from(high).expect("an offset");
    }
    consumer.assign(&from).expect("assigned");
    let (mut events, until) = (Vec::new(), Instant::now() + Duration::from_secs(60));
    // Apache Kafka's watermarks count control records too, but an idempotent producer writes none
    while events.len() < expected {
        assert!(
            Instant::now() < until,
            "{} of {expected} events",
            events.len()
        );
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            let text = String::from_utf8(message.payload().expect("a value").to_vec());
            let text = text.expect("UTF-8");
            let key = message.key().expect("a key").to_vec();
            let traceparent = message.headers().and_then(|headers| {
                let header = headers.iter().find(|header| header.key == "traceparent")?;
                Some(String::from_utf8_lossy(header.value?).into_owned())
            });
            events.push(Event {
                partition: message.partition(),
                key: String::from_utf8(key).expect("UTF-8"),
                value: serde_json::from_str(&text).expect("JSON"),
                text,
                traceparent,
            });
        }
    }
    events
}

fn client() -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers())
        .set("allow.auto.create.topics", "false");
    config
}

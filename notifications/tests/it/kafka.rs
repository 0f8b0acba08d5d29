//! A broker for the tests: librdkafka's mock cluster, one for all of them, or the real one that `KAFKA_BROKERS` names.
//! Every test has its own topics and group.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, mpsc},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    message::{Header, Headers as _, OwnedHeaders, OwnedMessage},
    mocking::MockCluster,
    producer::{FutureProducer, FutureRecord},
    topic_partition_list::{Offset, TopicPartitionList},
};
use uuid::Uuid;

pub(crate) const PARTITIONS: i32 = 4;

/// What is asked of the mock cluster.
enum Request {
    /// A topic with so many partitions.
    Create(String, i32),
    /// Its first partition has its leader, or none.
    Lead(String, bool),
}

type Asked = (Request, mpsc::Sender<()>);

/// The mock cluster cannot leave its thread: topics are asked of it there.
struct Mock {
    brokers: String,
    ask: mpsc::Sender<Asked>,
}

static MOCK: LazyLock<Arc<Mock>> = LazyLock::new(|| Arc::new(Mock::start()));

impl Mock {
    /// Its thread ends with the last handle.
    fn start() -> Mock {
        let (ask, asked) = mpsc::channel::<Asked>();
        let (started, start) = mpsc::channel();
        std::thread::spawn(move || {
            let cluster = MockCluster::new(1).expect("a mock cluster");
            started
                .send(cluster.bootstrap_servers())
                .expect("the test waits");
            for (request, done) in asked {
                let answer = match request {
                    Request::Create(topic, partitions) => {
                        cluster.create_topic(&topic, partitions, 1)
                    }
                    Request::Lead(topic, has_leader) => {
                        cluster.partition_leader(&topic, 0, has_leader.then_some(1))
                    }
                };
                answer.expect("the mock cluster does it");
                done.send(()).expect("the test waits");
            }
        });
        Mock {
            brokers: start.recv().expect("a broker"),
            ask,
        }
    }

    fn ask(&self, request: Request) {
        let (done, wait) = mpsc::channel();
        self.ask.send((request, done)).expect("it runs");
        wait.recv().expect("it is done");
    }
}

/// Topics and a group of one test.
#[derive(Clone)]
pub(crate) struct Kafka {
    /// `None`: the broker that `KAFKA_BROKERS` names.
    mock: Option<Arc<Mock>>,
    pub(crate) brokers: String,
    pub(crate) topic: String,
    pub(crate) dead_letter_topic: String,
    pub(crate) group: String,
    producer: FutureProducer,
}

impl Kafka {
    pub(crate) async fn new() -> Kafka {
        let name = Uuid::new_v4().simple().to_string();
        let given = std::env::var("KAFKA_BROKERS").ok();
        let mock = given.is_none().then(|| MOCK.clone());
        let brokers = given.or(mock.as_ref().map(|mock| mock.brokers.clone()));
        let brokers = brokers.expect("a broker");
        let kafka = Kafka {
            topic: format!("orders-{name}"),
            dead_letter_topic: format!("orders-{name}.dlq"),
            group: format!("notifications-{name}"),
            producer: client_config(&brokers).create().expect("a producer"),
            mock,
            brokers,
        };
        kafka.create_topics().await;
        kafka
    }

    /// The same names on a broker that was built anew: empty topics, and nobody has committed
    /// anything.
    pub(crate) async fn rebuilt(&self) -> Kafka {
        let mut kafka = self.clone();
        if self.mock.is_some() {
            let mock = Arc::new(Mock::start());
            kafka.brokers = mock.brokers.clone();
            kafka.mock = Some(mock);
            kafka.producer = client_config(&kafka.brokers).create().expect("a producer");
        } else {
            let topics = [self.topic.as_str(), &self.dead_letter_topic];
            let deleted = self
                .admin()
                .delete_topics(&topics, &AdminOptions::new())
                .await;
            deleted.expect("an answer");
        }
        kafka.create_topics().await;
        kafka
    }

    async fn create_topics(&self) {
        self.create(&self.topic, PARTITIONS).await;
        self.create(&self.dead_letter_topic, 1).await;
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        client_config(&self.brokers).create().expect("an admin")
    }

    /// Makes a topic.
    pub(crate) async fn create(&self, topic: &str, partitions: i32) {
        if let Some(mock) = &self.mock {
            return mock.ask(Request::Create(topic.to_owned(), partitions));
        }
        let admin = self.admin();
        // one that is being deleted is there until it is not
        crate::test_app::eventually("a topic is made", async || {
            let topic = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
            let made = admin.create_topics([&topic], &AdminOptions::new()).await;
            made.expect("an answer").iter().all(Result::is_ok)
        })
        .await;
    }

    /// The first partition has its leader, or none. `false`: only the mock cluster can be told so.
    pub(crate) fn lead(&self, has_leader: bool) -> bool {
        let request = Request::Lead(self.topic.clone(), has_leader);
        self.mock.as_ref().map(|mock| mock.ask(request)).is_some()
    }

    /// Sends as LOMS does: keyed by order, so that an order's events share a partition.
    pub(crate) async fn send(&self, order: i64, value: &str) -> (i32, i64) {
        self.send_record(order, Some(value.as_bytes()), None).await
    }

    pub(crate) async fn send_record(
        &self,
        order: i64,
        value: Option<&[u8]>,
        traceparent: Option<&str>,
    ) -> (i32, i64) {
        let (key, partition) = (order.to_string(), (order % i64::from(PARTITIONS)) as i32);
        let mut record = FutureRecord::<str, [u8]>::to(&self.topic)
            .key(&key)
            .partition(partition);
        record.payload = value;
        if let Some(traceparent) = traceparent {
            let header = Header {
                key: "traceparent",
                value: Some(traceparent),
            };
            record = record.headers(OwnedHeaders::new().insert(header));
        }
        let sent = self
            .producer
            .send(record, Duration::from_secs(10))
            .await
            .expect("acknowledged");
        (sent.partition, sent.offset)
    }

    /// Whether it is librdkafka's stand-in.
    pub(crate) fn is_mock(&self) -> bool {
        self.mock.is_some()
    }

    /// Sends an event with a time of its own.
    pub(crate) async fn send_at(&self, order: i64, value: &str, at: time::OffsetDateTime) {
        let key = order.to_string();
        let record = FutureRecord::to(&self.topic)
            .key(&key)
            .payload(value)
            .partition((order % i64::from(PARTITIONS)) as i32)
            .timestamp(at.unix_timestamp() * 1000);
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        sent.expect("acknowledged");
    }

    /// Commits an offset of the group, which nobody is a member of.
    pub(crate) fn commit(&self, partition: i32, offset: i64) {
        let consumer: BaseConsumer = client_config(&self.brokers)
            .set("group.id", &self.group)
            .create()
            .expect("a consumer");
        let mut offsets = TopicPartitionList::new();
        offsets
            .add_partition_offset(&self.topic, partition, Offset::Offset(offset))
            .expect("an offset");
        let committed = consumer.commit(&offsets, CommitMode::Sync);
        committed.expect("committed");
    }

    /// The shortest time after which a consumer that was killed is missed: the mock takes any, Kafka none below 6 s.
    pub(crate) fn shortest_session(&self) -> &'static str {
        if self.mock.is_some() { "4s" } else { "6s" }
    }

    /// Sends many at once, in order, and waits for all.
    pub(crate) async fn send_all(&self, events: &[(i64, String)]) {
        let send = |(order, value): &(i64, String)| {
            let key = order.to_string();
            let record = FutureRecord::<str, str>::to(&self.topic)
                .key(&key)
                .payload(value)
                .partition((order % i64::from(PARTITIONS)) as i32);
            let queued = self.producer.send_result(record);
            queued.map_err(|(error, _)| error).expect("queued")
        };
        let reports: Vec<_> = events.iter().map(send).collect();
        for report in reports {
            let sent = report.await.expect("reported");
            sent.map_err(|(error, _)| error).expect("acknowledged");
        }
    }

    /// Puts a record into the first partition of any topic.
    pub(crate) async fn put(
        &self,
        topic: &str,
        value: Option<&[u8]>,
        headers: Option<&OwnedHeaders>,
    ) {
        let mut record = FutureRecord::<str, [u8]>::to(topic).partition(0);
        record.payload = value;
        record.headers = headers.cloned();
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        sent.expect("acknowledged");
    }

    /// The dead letters, which are to be `count`.
    pub(crate) fn dead_letters(&self, count: usize) -> Vec<OwnedMessage> {
        self.records(&self.dead_letter_topic, 0, count)
    }

    /// What a partition has, which is to be `count` records; blocks up to 20 s for them, half a second for one too many.
    pub(crate) fn records(&self, topic: &str, partition: i32, count: usize) -> Vec<OwnedMessage> {
        let consumer: BaseConsumer = client_config(&self.brokers)
            .set("group.id", "reader")
            .create()
            .expect("a consumer");
        let mut from = TopicPartitionList::new();
        from.add_partition_offset(topic, partition, Offset::Beginning)
            .expect("an offset");
        consumer.assign(&from).expect("assigned");
        let mut records = Vec::new();
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while std::time::Instant::now() < until {
            match consumer.poll(Duration::from_millis(500)) {
                Some(Ok(message)) => records.push(message.detach()),
                Some(Err(_)) => {}
                None if records.len() < count => {}
                None => break,
            }
        }
        assert_eq!(records.len(), count, "records of {topic}/{partition}");
        records
    }

    /// The offset that the group goes on from, in a partition.
    pub(crate) fn committed(&self, partition: i32) -> Option<i64> {
        self.offsets().committed().get(&partition).copied()
    }

    /// A way to ask for them again and again.
    pub(crate) fn offsets(&self) -> Offsets {
        let consumer = client_config(&self.brokers)
            .set("group.id", &self.group)
            .create()
            .expect("a consumer");
        Offsets {
            consumer,
            topic: self.topic.clone(),
        }
    }
}

/// What the group of a test has committed.
pub(crate) struct Offsets {
    consumer: BaseConsumer,
    topic: String,
}

impl Offsets {
    /// The offset that the group goes on from, by partition; none before its first commit.
    pub(crate) fn committed(&self) -> BTreeMap<i32, i64> {
        let mut asked = TopicPartitionList::new();
        asked.add_partition_range(&self.topic, 0, PARTITIONS - 1);
        let answer = self
            .consumer
            .committed_offsets(asked, Duration::from_secs(5));
        let Ok(committed) = answer else {
            return BTreeMap::new();
        };
        let known = committed.elements().into_iter().filter_map(|element| {
            let offset = element.offset().to_raw().filter(|offset| *offset >= 0);
            Some((element.partition(), offset?))
        });
        known.collect()
    }
}

fn client_config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

/// The text of a header of a message.
pub(crate) fn header(message: &OwnedMessage, key: &str) -> Option<String> {
    let headers = message.headers()?;
    let header = headers.iter().find(|header| header.key == key)?;
    Some(String::from_utf8_lossy(header.value?).into_owned())
}

/// An event as LOMS writes it.
pub(crate) fn event(user: i64, order: i64, sequence: i32, status: &str, at: &str) -> String {
    format!(
        r#"{{"UserId":{user},"OrderID":{order},"Status":"{status}","Message":"order {order} is {status}","Sequence":{sequence},"OccurredAt":"{at}"}}"#
    )
}

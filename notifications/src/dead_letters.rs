//! What cannot be saved goes to the dead-letter topic as it came, with its origin and the cause in the headers, so that it
//! never blocks its partition and can be put back once the cause is mended.

use std::{sync::LazyLock, time::Duration};

use futures::future::join_all;
use platform::{config::KafkaConfig, error::StartError, grpc::registered, kafka};
use prometheus::{IntCounterVec, Opts};
use rdkafka::{
    Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders, OwnedMessage, ToBytes},
    producer::{FutureProducer, FutureRecord},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Header: the topic it was read from.
pub const ORIGIN_TOPIC: &str = "origin.topic";
/// Header: its partition there.
pub const ORIGIN_PARTITION: &str = "origin.partition";
/// Header: its offset there.
pub const ORIGIN_OFFSET: &str = "origin.offset";
/// Header: its timestamp there, milliseconds since 1970.
pub const ORIGIN_TIMESTAMP: &str = "origin.timestamp";
/// Header: [`Cause`] in a word.
pub const CAUSE: &str = "dead_letter.cause";
/// Header: what was wrong, for a person.
pub const ERROR: &str = "dead_letter.error";
/// Header: when it was put here, RFC 3339.
pub const TIME: &str = "dead_letter.time";

static DEAD_LETTERS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_counter_dead_letters_total",
        "Records that went to the dead-letter topic, by cause.",
    );
    registered(IntCounterVec::new(opts, &["cause"]))
});

/// Why a record is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It is no event.
    Unreadable,
    /// The database refuses what it says.
    Refused,
    /// Another event has its place within the order.
    Conflict,
}

impl Cause {
    fn as_str(self) -> &'static str {
        match self {
            Cause::Unreadable => "unreadable",
            Cause::Refused => "refused",
            Cause::Conflict => "conflict",
        }
    }
}

/// A record on its way to the dead-letter topic.
pub struct Letter {
    /// As it was read.
    pub record: OwnedMessage,
    /// Why it is dead.
    pub cause: Cause,
    /// The same for a person.
    pub error: String,
}

/// The dead-letter topic.
#[derive(Clone)]
pub struct DeadLetters {
    producer: FutureProducer,
    topic: String,
}

impl DeadLetters {
    /// A producer that connects by itself. `timeout` bounds the wait for the broker's acknowledgement.
    pub fn new(
        brokers: &[String],
        config: &KafkaConfig,
        timeout: Duration,
    ) -> Result<DeadLetters, StartError> {
        LazyLock::force(&DEAD_LETTERS);
        let producer = kafka::producer_config(brokers, config)
            // letters have no order, and one written twice says so by its origin: no fatal errors to recover from
            .set("enable.idempotence", "false")
            .set("message.timeout.ms", timeout.as_millis().to_string())
            .create()
            .map_err(|error| {
                StartError::new(
                    format!("preparing the Kafka producer: {error}"),
                    "correct brokers",
                )
            })?;
        Ok(DeadLetters {
            producer,
            topic: config.dead_letter_topic.clone(),
        })
    }

    /// Sends all of `letters` and takes out those that the broker has acknowledged.
    ///
    /// # Errors
    /// The first failure; what is left in `letters` is to be sent again.
    pub async fn send(&self, letters: &mut Vec<Letter>) -> Result<(), KafkaError> {
        let results = join_all(letters.iter().map(|letter| self.send_one(letter))).await;
        let mut failure = None;
        let mut results = results.into_iter();
        letters.retain(|letter| match results.next() {
            Some(Ok(())) => {
                count(letter);
                false
            }
            Some(Err(error)) => {
                failure.get_or_insert(error);
                true
            }
            None => true,
        });
        failure.map_or(Ok(()), Err)
    }

    async fn send_one(&self, letter: &Letter) -> Result<(), KafkaError> {
        match self.produce(letter, letter.record.payload()).await {
            // its headers made it too long: where it came from still says where to find it
            Err(KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)) => {
                self.produce(letter, None).await
            }
            result => result,
        }
    }

    async fn produce(&self, letter: &Letter, payload: Option<&[u8]>) -> Result<(), KafkaError> {
        let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).headers(headers(letter));
        record.key = letter.record.key();
        record.payload = payload;
        // no wait for room in the queue: a full one is a failure like any other, and tried again
        let sent = self.producer.send(record, Duration::ZERO).await;
        sent.map(drop).map_err(|(error, _)| error)
    }

    /// The state of a topic for the readiness report: `ok`, or what is wrong. Blocks up to `timeout`.
    pub fn topic_state(&self, topic: &str, timeout: Duration) -> String {
        kafka::topic_state(&self.producer, topic, timeout)
    }
}

fn headers(letter: &Letter) -> OwnedHeaders {
    let Letter {
        record,
        cause,
        error,
    } = letter;
    let now = OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .unwrap_or_default();
    let timestamp = record
        .timestamp()
        .to_millis()
        .map(|millis| millis.to_string());
    let kept = record.headers().cloned().unwrap_or_default();
    let kept = with(kept, ORIGIN_TOPIC, record.topic());
    let kept = with(kept, ORIGIN_PARTITION, &record.partition().to_string());
    let kept = with(kept, ORIGIN_OFFSET, &record.offset().to_string());
    let kept = with(kept, ORIGIN_TIMESTAMP, &timestamp.unwrap_or_default());
    let kept = with(kept, CAUSE, cause.as_str());
    let kept = with(kept, ERROR, error);
    with(kept, TIME, &now)
}

fn with<V: ToBytes + ?Sized>(headers: OwnedHeaders, key: &str, value: &V) -> OwnedHeaders {
    headers.insert(Header {
        key,
        value: Some(value),
    })
}

fn count(letter: &Letter) {
    let Letter {
        record,
        cause,
        error,
    } = letter;
    DEAD_LETTERS.with_label_values(&[cause.as_str()]).inc();
    tracing::warn!(
        kafka.topic = record.topic(),
        kafka.partition = record.partition(),
        kafka.offset = record.offset(),
        cause = cause.as_str(),
        error = %error,
        "record dead-lettered"
    );
}

//! What cannot be saved goes to the dead-letter topic as it came, with its origin and the cause in the headers, so that it
//! never blocks its partition and can be put back once the cause is mended.

use std::{sync::LazyLock, time::Duration};

use futures::future::join_all;
use platform::{config::KafkaConfig, error::StartError, grpc::registered, kafka};
use prometheus::{IntCounterVec, Opts};
use rdkafka::{
    Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};

use crate::letter::{Cause, Kept, Letter};

static DEAD_LETTERS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_counter_dead_letters_total",
        "Records that went to the dead-letter topic, by cause.",
    );
    registered(IntCounterVec::new(opts, &["cause"]))
});

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
        for cause in Cause::ALL {
            DEAD_LETTERS.with_label_values(&[cause.as_str()]);
        }
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

    /// As much of it as the broker takes: where it came from still says where to find the rest.
    async fn send_one(&self, letter: &Letter) -> Result<(), KafkaError> {
        for kept in [Kept::All, Kept::KeyAndHeaders] {
            match self.produce(letter, kept).await {
                Err(KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)) => {}
                result => return result,
            }
        }
        self.produce(letter, Kept::Nothing).await
    }

    async fn produce(&self, letter: &Letter, kept: Kept) -> Result<(), KafkaError> {
        let headers = letter.headers(kept);
        let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).headers(headers);
        record.key = letter.record.key().filter(|_| kept != Kept::Nothing);
        record.payload = letter.record.payload().filter(|_| kept == Kept::All);
        // no wait for room in the queue: a full one is a failure like any other, and tried again
        let sent = self.producer.send(record, Duration::ZERO).await;
        sent.map(drop).map_err(|(error, _)| error)
    }

    /// The state of a topic for the readiness report: `ok`, or what is wrong. Blocks up to `timeout`.
    pub fn topic_state(&self, topic: &str, timeout: Duration) -> String {
        kafka::topic_state(&self.producer, topic, timeout)
    }
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

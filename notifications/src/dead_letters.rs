//! What cannot be saved is kept in a table as it came, before its offset is committed; from there a
//! worker takes it to the dead-letter topic, with its origin and the cause in the headers. So it
//! never blocks its partition, whatever the topic is like, and can be put back once the cause is
//! mended.

use std::{
    collections::HashSet,
    sync::{Arc, LazyLock},
    time::Duration,
};

use fail::fail_point;
use futures::future::join_all;
use platform::{
    config::KafkaConfig,
    error::StartError,
    grpc::registered,
    kafka,
    pg::{self, Db, Pool},
    state_log::StateLog,
};
use prometheus::{IntCounterVec, IntGauge, Opts};
use rdkafka::{
    Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    config::DeadLettersConfig,
    event::Source,
    letter::{Cause, Kept, KeptLetter, Letter},
    store::dead_letters::{self as store, Backlog},
};

/// Of one transaction that keeps letters: what PostgreSQL writes within any statement time-out.
const CHUNK_BYTES: i64 = 4 * 1024 * 1024;
/// Letters on their way to the topic at once: each may be as long as a record.
const MOVED_AT_ONCE: i64 = 50;
/// How long a letter is left to the replica that has it, beyond the broker's bound.
const CLAIM_MARGIN: Duration = Duration::from_secs(5);
/// Rows deleted by one statement.
const DELETED_AT_ONCE: i64 = 100;

static DEAD_LETTERS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_counter_dead_letters_total",
        "Records that could not be saved, by cause.",
    );
    registered(IntCounterVec::new(opts, &["cause"]))
});
static UNMOVED: LazyLock<IntGauge> = LazyLock::new(|| {
    let help = "Dead letters that wait to be taken to their topic.";
    registered(IntGauge::new("notifications_dead_letters_unmoved", help))
});
static UNMOVED_BYTES: LazyLock<IntGauge> = LazyLock::new(|| {
    let help = "Bytes of the dead letters that wait to be taken to their topic.";
    let gauge = IntGauge::new("notifications_dead_letters_unmoved_bytes", help);
    registered(gauge)
});
static MOVING: StateLog = StateLog::new(
    "dead letters not taken to their topic",
    "dead letters are taken to their topic again",
);

/// Whether there was room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// All letters are kept.
    Enough,
    /// So many wait to be moved that no more is kept.
    Full,
}

/// Where records go that cannot be saved.
#[derive(Clone)]
pub struct DeadLetters {
    producer: FutureProducer,
    topic: String,
    timeout: Duration,
    config: DeadLettersConfig,
    /// Notified when there is something to move.
    kept: Arc<Notify>,
}

impl DeadLetters {
    /// A producer that connects by itself. `timeout` bounds the wait for the broker's acknowledgement.
    pub fn new(
        brokers: &[String],
        kafka: &KafkaConfig,
        config: &DeadLettersConfig,
        timeout: Duration,
    ) -> Result<DeadLetters, StartError> {
        for cause in Cause::ALL {
            DEAD_LETTERS.with_label_values(&[cause.as_str()]);
        }
        for gauge in [&UNMOVED, &UNMOVED_BYTES] {
            LazyLock::force(gauge);
        }
        let producer = kafka::producer_config(brokers, kafka)
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
            topic: kafka.dead_letter_topic.clone(),
            timeout,
            config: config.clone(),
            kept: Arc::new(Notify::new()),
        })
    }

    /// Keeps as many of `letters` as there is room for, and takes those out.
    ///
    /// # Errors
    /// The database's; what is left in `letters` is to be kept again.
    pub async fn keep(
        &self,
        pool: &Pool,
        cluster: &str,
        letters: &mut Vec<Letter>,
    ) -> pg::Result<Room> {
        while !letters.is_empty() {
            let work = async |db: &mut Db| self.keep_some(db, cluster, letters).await;
            let kept = pool.with_connection(work).await?;
            if kept == 0 {
                return Ok(Room::Full);
            }
            letters.drain(..kept);
            self.kept.notify_one();
        }
        Ok(Room::Enough)
    }

    /// Answers how many, from the first.
    async fn keep_some(&self, db: &mut Db, cluster: &str, letters: &[Letter]) -> pg::Result<usize> {
        let mut transaction = db.begin().await?;
        let unmoved = store::measure_unmoved(&mut transaction).await?;
        let some = &letters[..self.room_for(unmoved, letters)];
        if some.is_empty() {
            transaction.rollback().await?;
            return Ok(0);
        }
        let inserted = store::insert_dead_letters(&mut transaction, cluster, some).await?;
        transaction.commit().await?;
        let inserted: HashSet<Source> = inserted.into_iter().collect();
        let is_new = |letter: &&Letter| {
            inserted.contains(&(letter.record.partition(), letter.record.offset()))
        };
        some.iter().filter(is_new).for_each(count);
        Ok(some.len())
    }

    /// How many of `letters` fit beside what waits. One always does as long as the bounds are not
    /// reached.
    fn room_for(&self, unmoved: Backlog, letters: &[Letter]) -> usize {
        let rows = self.config.max_rows.saturating_sub(unmoved.rows);
        let bytes = self.config.max_bytes.saturating_sub(unmoved.bytes);
        if rows <= 0 || bytes <= 0 {
            return 0;
        }
        let mut left = bytes.min(CHUNK_BYTES);
        let fits = letters
            .iter()
            .take(usize::try_from(rows).unwrap_or(usize::MAX))
            .take_while(|letter| {
                left -= letter.size();
                left >= 0
            });
        fits.count().max(1)
    }

    /// Moves what is kept until told to stop.
    pub async fn run(self, pool: Pool, stopping: CancellationToken) -> anyhow::Result<()> {
        while !stopping.is_cancelled() {
            let pause = match self.step(&pool).await {
                Ok(true) => continue,
                Ok(false) => {
                    MOVING.works();
                    self.config.poll
                }
                Err(error) => {
                    MOVING.failed(&format_args!("{error:#}"));
                    self.config.poll
                }
            };
            tokio::select! {
                () = stopping.cancelled() => {}
                () = self.kept.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(())
    }

    /// Takes some to the topic and deletes some that it has had for long; whether there may be
    /// more. No transaction is open while the broker acknowledges. A crash before the mark means
    /// that the topic gets them once more.
    async fn step(&self, pool: &Pool) -> anyhow::Result<bool> {
        let claim = (self.timeout + CLAIM_MARGIN).as_secs_f64();
        let keep = self.config.keep.as_secs_f64();
        let look = async |db: &mut Db| -> pg::Result<(Vec<KeptLetter>, u64)> {
            let mut transaction = db.begin().await?;
            let deleted = store::delete_moved(&mut transaction, keep, DELETED_AT_ONCE).await?;
            let letters = store::claim_unmoved(&mut transaction, claim, MOVED_AT_ONCE).await?;
            show(store::measure_unmoved(&mut transaction).await?);
            transaction.commit().await?;
            Ok((letters, deleted))
        };
        let (letters, deleted) = pool.with_connection(look).await?;
        if letters.is_empty() {
            return Ok(deleted == DELETED_AT_ONCE.unsigned_abs());
        }
        let results = join_all(letters.iter().map(|letter| self.send(letter))).await;
        fail_point!("letters-marking", |_| std::process::abort());
        let (mut moved, mut left, mut failure) = (Vec::new(), Vec::new(), None);
        for (letter, result) in letters.iter().zip(results) {
            match result {
                Ok(()) => moved.push(letter.id),
                Err(error) => {
                    left.push(letter.id);
                    failure.get_or_insert(error);
                }
            }
        }
        let mark = async |db: &mut Db| {
            let mut transaction = db.begin().await?;
            store::mark_moved(&mut transaction, &moved).await?;
            store::release_unmoved(&mut transaction, &left).await?;
            show(store::measure_unmoved(&mut transaction).await?);
            transaction.commit().await
        };
        pool.with_connection(mark).await?;
        failure.map_or(Ok(true), |error| Err(error.into()))
    }

    /// As much of it as the broker takes: its row has the rest, for a while, and where it came
    /// from.
    async fn send(&self, letter: &KeptLetter) -> Result<(), KafkaError> {
        for kept in [Kept::All, Kept::KeyAndHeaders] {
            match self.produce(letter, kept).await {
                Err(KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)) => {}
                result => return result,
            }
        }
        self.produce(letter, Kept::Nothing).await
    }

    async fn produce(&self, letter: &KeptLetter, kept: Kept) -> Result<(), KafkaError> {
        let headers = letter.headers(kept);
        let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).headers(headers);
        record.key = letter.key.as_deref().filter(|_| kept != Kept::Nothing);
        record.payload = letter.value.as_deref().filter(|_| kept == Kept::All);
        // no wait for room in the queue: a full one is a failure like any other, and tried again
        let sent = self.producer.send(record, Duration::ZERO).await;
        sent.map(drop).map_err(|(error, _)| error)
    }

    /// The state of a topic for the readiness report: `ok`, or what is wrong. Blocks up to `timeout`.
    pub fn topic_state(&self, topic: &str, timeout: Duration) -> String {
        kafka::topic_state(&self.producer, topic, timeout)
    }
}

fn show(unmoved: Backlog) {
    UNMOVED.set(unmoved.rows);
    UNMOVED_BYTES.set(unmoved.bytes);
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

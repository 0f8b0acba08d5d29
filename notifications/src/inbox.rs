//! Takes order events in. A batch is what one round of polling found: it is saved (see `saving`), what cannot be saved
//! is dead-lettered, then its offsets are committed; a crash in between only means that it is read, and recognised, again.
//! While the database or the broker fails, the batch stays in hand, the partitions are paused and polling goes on.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use fail::fail_point;
use futures::FutureExt as _;
use platform::{
    config::KafkaConfig,
    error::StartError,
    grpc::registered,
    kafka::{self, Start},
    pg::Pool,
    state_log::StateLog,
    telemetry,
};
use prometheus::IntCounter;
use rdkafka::{
    Message as _, TopicPartitionList,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, KafkaResult},
    message::BorrowedMessage,
    topic_partition_list::Offset,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    assignment::{self, Assignment, OFFSETS},
    config::InboxConfig,
    dead_letters::{DeadLetters, Room},
    event::Received,
    hand::Hand,
    lag,
    letter::{Cause, Letter},
    saving::{self, Progress, Stopped, Verdict},
    starts,
};

/// How long the broker may take for an answer about the lag; stopping waits for it.
const BROKER_BOUND: Duration = Duration::from_secs(1);

static SETTLING: StateLog = StateLog::new("batch not settled", "batches are settled again");
static BEGINNING: StateLog =
    StateLog::new("partitions came and cannot begin", "partitions begin again");
static FULL: StateLog = StateLog::new(
    "too many dead letters wait for their topic, partitions are paused",
    "dead letters are kept again",
);
static KAFKA: StateLog = StateLog::new(
    "kafka does not answer as it should",
    "kafka answers as it should",
);

static SAVED: LazyLock<IntCounter> = LazyLock::new(|| {
    registered(IntCounter::new(
        "notifications_counter_saved_total",
        "Events saved for the first time.",
    ))
});
static DUPLICATES: LazyLock<IntCounter> = LazyLock::new(|| {
    registered(IntCounter::new(
        "notifications_counter_duplicates_total",
        "Events that were saved before.",
    ))
});

/// The consumer of order events.
pub struct Inbox {
    consumer: Arc<StreamConsumer<Assignment>>,
    dead_letters: DeadLetters,
    pool: Pool,
    topic: String,
    start: Start,
    /// Partitions that could not begin, and when they are tried again: to ask for one without a
    /// leader takes seconds.
    unbegun: Option<(BTreeSet<i32>, Instant)>,
    config: InboxConfig,
    saved: Arc<Notify>,
}

impl Inbox {
    /// A consumer that connects by itself, once it runs. `saved` is notified when there is something to tell.
    pub fn new(
        brokers: &[String],
        kafka: &KafkaConfig,
        config: InboxConfig,
        pool: Pool,
        dead_letters: DeadLetters,
        saved: Arc<Notify>,
    ) -> Result<Inbox, StartError> {
        for metric in [&SAVED, &DUPLICATES] {
            LazyLock::force(metric);
        }
        saving::show_metrics();
        assignment::show_metrics();
        starts::show_metrics();
        let consumer: StreamConsumer<_> = kafka::consumer_config(brokers, kafka)
            // a partition's turn: what is fetched at once is saved at once, and the other partitions wait for it (with the
            // default, 1 MB, for 5 s while a backlog is read); all of them come with one request
            .set("fetch.message.max.bytes", "16384")
            // bounds what a paused or slow consumer holds in memory
            .set("queued.max.messages.kbytes", "16384")
            .create_with_context(Assignment::default())
            .map_err(|error| {
                StartError::new(
                    format!("preparing the Kafka consumer: {error}"),
                    "correct brokers and kafka",
                )
            })?;
        let topic = kafka.topic.clone();
        Ok(Inbox {
            consumer: Arc::new(consumer),
            dead_letters,
            pool,
            topic,
            start: kafka.start,
            unbegun: None,
            config,
            saved,
        })
    }

    /// Consumes until told to stop; what is in hand then is finished, or left for the next to read.
    pub async fn run(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let (consumer, ended) = (self.consumer.clone(), stopping.child_token());
        let watching = lag::watch(consumer, ended.clone());
        let consuming = async {
            let outcome = self.consume(&stopping).await;
            ended.cancel();
            outcome
        };
        let (outcome, ()) = tokio::join!(consuming, watching);
        outcome?;
        // closing waits for the commits and leaves the group, so that others need not wait for the session to lapse
        tokio::task::spawn_blocking(move || drop(self.consumer)).await?;
        Ok(())
    }

    async fn consume(&mut self, stopping: &CancellationToken) -> KafkaResult<()> {
        self.consumer.subscribe(&[&self.topic])?;
        let mut hand = Hand::default();
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return Ok(()),
                filled = self.fill(&mut hand) => filled?,
            }
            self.settle(&mut hand, stopping).await?;
        }
    }

    /// Waits for a record, or for partitions, then takes what is there already: an idle system
    /// saves one event at once, a busy one hundreds. What failed does not wait for a record:
    /// letters that there was no room for, partitions that have not begun.
    async fn fill(&mut self, hand: &mut Hand) -> KafkaResult<()> {
        self.begin(hand).await;
        let context = self.consumer.context();
        let patience = if hand.letters.is_empty() && context.arrived().is_empty() {
            Duration::MAX
        } else {
            self.config.longest_backoff
        };
        let polled = tokio::select! {
            () = context.arrival() => return Ok(()),
            () = tokio::time::sleep(patience) => return Ok(()),
            polled = self.consumer.recv() => polled,
        };
        take(&self.consumer, hand, polled)?;
        for _ in 1..self.config.batch {
            let Some(polled) = self.consumer.recv().now_or_never() else {
                break;
            };
            take(&self.consumer, hand, polled)?;
        }
        let jumps = std::mem::take(&mut hand.jumps);
        starts::explain(&self.consumer, &self.topic, jumps).await;
        Ok(())
    }

    /// Settles where the reading of partitions that have come begins; they stay paused as long as
    /// that fails.
    async fn begin(&mut self, hand: &mut Hand) {
        let arrived = self.consumer.context().arrived();
        let waits = |(unbegun, until): &(BTreeSet<i32>, Instant)| {
            arrived.is_subset(unbegun) && Instant::now() < *until
        };
        if arrived.is_empty() || self.unbegun.as_ref().is_some_and(waits) {
            return;
        }
        let begun = async {
            let (consumer, topic) = (&self.consumer, &self.topic);
            let offsets = starts::begin(consumer, &self.pool, topic, self.start, &arrived).await?;
            let has_begun = |partition| offsets.contains_key(&partition);
            consumer.context().begun(&**consumer, has_begun)?;
            anyhow::Ok(offsets)
        };
        let begun = begun.await;
        let left = self.consumer.context().arrived();
        match begun {
            Ok(offsets) => {
                hand.expect(offsets);
                match left.is_empty() {
                    true => BEGINNING.works(),
                    false => BEGINNING.failed(&format_args!("no answer for {left:?}")),
                }
            }
            Err(error) => BEGINNING.failed(&format_args!("{error:#}")),
        }
        self.unbegun = Some((left, Instant::now() + self.config.longest_backoff));
    }

    /// Tries until the hand is empty, but for letters that there is no room for. No failure of the
    /// database or the broker is a reason to skip an event.
    async fn settle(&mut self, hand: &mut Hand, stopping: &CancellationToken) -> KafkaResult<()> {
        let mut waits = ExponentialBuilder::default()
            .with_min_delay(self.config.backoff)
            .with_max_delay(self.config.longest_backoff)
            .with_jitter()
            .without_max_times()
            .build();
        let mut failed = false;
        while let Err(error) = self.try_settle(hand).await {
            let wait = waits.next().unwrap_or(self.config.longest_backoff);
            SETTLING.failed(&format_args!("{error:#}"));
            if !failed {
                self.consumer.context().pause(&*self.consumer)?;
                failed = true;
            }
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                polled = self.keep_polling(hand, wait) => polled?,
            }
        }
        if failed {
            self.consumer.context().resume(&*self.consumer)?;
        }
        SETTLING.works();
        Ok(())
    }

    /// Nothing comes from paused partitions, but a member that does not poll is put out of the group.
    async fn keep_polling(&mut self, hand: &mut Hand, wait: Duration) -> KafkaResult<()> {
        let until = Instant::now() + wait;
        while let Ok(polled) = tokio::time::timeout_at(until, self.consumer.recv()).await {
            take(&self.consumer, hand, polled)?;
        }
        Ok(())
    }

    async fn try_settle(&self, hand: &mut Hand) -> anyhow::Result<()> {
        hand.forget(&self.consumer.context().take_lost());
        if hand.len() == 0 {
            return Ok(());
        }
        let span = tracing::info_span!(
            "inbox.settle",
            otel.kind = "consumer",
            batch.size = hand.len()
        );
        let events = hand.events.iter();
        let causes = events.filter_map(|(received, _)| received.traceparent.as_deref());
        telemetry::link_to_calls(&span, causes);
        async {
            self.save(hand).await?;
            fail_point!("events-saved", |_| std::process::abort());
            self.keep(hand).await?;
            fail_point!("offsets-committing", |_| std::process::abort());
            self.commit(hand);
            Ok(())
        }
        .instrument(span)
        .await
    }

    /// Takes out of the hand what is saved, and what is not to be: the rest, after an error, is what the next try is about.
    async fn save(&self, hand: &mut Hand) -> Result<(), Stopped> {
        if hand.events.is_empty() {
            return Ok(());
        }
        // two replicas that save the same orders lock them in the same order
        hand.events.sort_by_key(|(received, _)| {
            (
                received.event.order.get(),
                received.event.place(),
                received.source,
            )
        });
        let records: Vec<&Received> = hand.events.iter().map(|(received, _)| received).collect();
        let Progress { verdicts, stopped } = saving::save(&self.pool, &self.topic, &records).await;
        if !verdicts.is_empty() {
            self.saved.notify_one();
        }
        for ((_, record), verdict) in hand.events.drain(..verdicts.len()).zip(verdicts) {
            let (cause, error) = match verdict {
                Verdict::Saved => {
                    SAVED.inc();
                    continue;
                }
                Verdict::Duplicate => {
                    DUPLICATES.inc();
                    continue;
                }
                Verdict::Conflict(error) => (Cause::Conflict, error),
                Verdict::Refused(error) => (Cause::Refused, error),
            };
            hand.letters.push(Letter::new(record, cause, &error));
        }
        match stopped {
            None => Ok(()),
            Some(stopped) => {
                if let Stopped::Database(error) = &stopped
                    && !error.failure().passes()
                {
                    error.log();
                }
                Err(stopped)
            }
        }
    }

    /// Keeps what cannot be saved. Without room for it its partition waits, and no other does.
    async fn keep(&self, hand: &mut Hand) -> anyhow::Result<()> {
        let (consumer, context) = (&*self.consumer, self.consumer.context());
        if !hand.letters.is_empty() {
            let asked = self.consumer.clone();
            // librdkafka knows it from its first answer of a broker, and asks again only if that
            // had none
            let cluster =
                tokio::task::spawn_blocking(move || asked.client().fetch_cluster_id(BROKER_BOUND));
            let cluster = cluster.await?.unwrap_or_default();
            let letters = &mut hand.letters;
            match self
                .dead_letters
                .keep(&self.pool, &cluster, letters)
                .await?
            {
                Room::Enough => FULL.works(),
                Room::Full => {
                    FULL.failed(&"raise dead_letters.max_rows or max_bytes, or mend the topic")
                }
            }
        }
        context.hold(consumer, hand.partitions_of_letters())?;
        Ok(())
    }

    /// Not waited for: a commit that fails or is lost costs a second reading, which is recognised.
    fn commit(&self, hand: &mut Hand) {
        let mut offsets = TopicPartitionList::new();
        for (partition, next) in hand.take_next() {
            // cannot fail: the offset is one that Kafka gave
            let _ = offsets.add_partition_offset(&self.topic, partition, Offset::Offset(next));
        }
        if let Err(error) = self.consumer.commit(&offsets, CommitMode::Async) {
            OFFSETS.failed(&error);
        }
    }
}

/// Adds what was polled to the hand. A partition that went away is forgotten first: the callback ran before this record
/// was handed out, and the same partition may be back already.
fn take(
    consumer: &StreamConsumer<Assignment>,
    hand: &mut Hand,
    polled: KafkaResult<BorrowedMessage<'_>>,
) -> KafkaResult<()> {
    let context = consumer.context();
    hand.forget(&context.take_lost());
    match polled {
        Ok(message) => {
            // fetched before the pause at its arrival; it comes again
            if !context.has_arrived(message.partition()) {
                hand.add(&message);
            }
            KAFKA.works();
            Ok(())
        }
        Err(KafkaError::MessageConsumptionFatal(code)) => {
            Err(KafkaError::MessageConsumptionFatal(code))
        }
        Err(error) => {
            KAFKA.failed(&error);
            Ok(())
        }
    }
}

//! Carries events from the outbox to Kafka. One relay at a time over all replicas; a row is deleted after the broker has
//! acknowledged it, so an event is sent at least once, and the first time in order.

use std::{
    collections::HashSet,
    pin::pin,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use platform::{
    config::KafkaConfig, error::StartError, grpc::registered, kafka, pg::OwnConnection,
    state_log::StateLog, tasks::Tasks, telemetry,
};
use prometheus::{Gauge, IntCounter, IntGauge};
use rdkafka::{
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _, PurgeConfig},
    util::Timeout,
};
use sqlx::{Connection as _, PgConnection, Postgres, Transaction};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    config::OutboxConfig,
    crash::CrashPoint,
    event,
    store::outbox::{self as store, OutboxRow},
};

/// Wakes the relay of this process after a commit; clones share it. Never NOTIFY in the order's transaction: that
/// serialises commits.
#[derive(Clone, Default)]
pub(crate) struct Relay(Arc<Notify>);

impl Relay {
    pub(crate) fn wake(&self) {
        self.0.notify_one();
    }
}

/// The producer, replaced when it is broken beyond repair.
#[derive(Clone)]
pub(crate) struct Broker {
    brokers: Vec<String>,
    kafka: KafkaConfig,
    producer: Arc<Mutex<FutureProducer>>,
}

impl Broker {
    /// # Errors
    /// A setting that librdkafka refuses; a broker that is away is none.
    pub(crate) fn new(brokers: &[String], kafka: &KafkaConfig) -> Result<Broker, StartError> {
        if brokers.is_empty() {
            return Err(StartError::new(
                "brokers is empty",
                "name at least one host:port",
            ));
        }
        let producer = kafka::producer_config(brokers, kafka)
            .create()
            .map_err(|error| {
                StartError::new(
                    format!("making the Kafka producer: {error}"),
                    "correct brokers",
                )
            })?;
        Ok(Broker {
            brokers: brokers.to_vec(),
            kafka: kafka.clone(),
            producer: Arc::new(Mutex::new(producer)),
        })
    }

    fn producer(&self) -> FutureProducer {
        self.producer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// After a fatal error an idempotent producer refuses everything: only a new one helps.
    fn replace_if_fatal(&self) {
        let Some((code, cause)) = self.producer().client().fatal_error() else {
            return;
        };
        tracing::error!(kafka.code = ?code, error = %cause, "producer failed for good, making a new one");
        match kafka::producer_config(&self.brokers, &self.kafka).create() {
            Ok(fresh) => *self.producer.lock().unwrap_or_else(PoisonError::into_inner) = fresh,
            Err(error) => tracing::error!(error = %error, "no new producer"),
        }
    }

    /// `ok`, or what readiness should say about the broker.
    pub(crate) async fn state(&self) -> String {
        let (producer, topic) = (self.producer(), self.kafka.topic.clone());
        let asked = tokio::task::spawn_blocking(move || {
            kafka::topic_state(&producer, &topic, Duration::from_secs(1))
        });
        asked.await.unwrap_or_else(|_| "unknown".into())
    }
}

static SENDING: StateLog = StateLog::new("events were not sent", "events are sent again");

/// Starts the relay, which has a connection of its own; a database that is silent for longer than `bound` is given up.
pub(crate) fn start(
    mut db: OwnConnection,
    bound: Duration,
    broker: Broker,
    config: OutboxConfig,
    relay: Relay,
    tasks: &Tasks,
) {
    LazyLock::force(&SENT);
    LazyLock::force(&BACKLOG);
    let stopping = tasks.stopping();
    let bound = bound + config.broker_timeout + LAST_WAIT;
    tasks.worker_thread("relay", async move {
        let mut watched = None;
        loop {
            let began = Instant::now();
            let watch = watched.is_none_or(|last| began - last >= WATCH_EVERY);
            let sent = step(&mut db, bound, &broker, &config, &stopping, watch).await;
            let sent = sent.inspect(|_| SENDING.works());
            if watch {
                watched = Some(began);
            }
            let pause = match sent {
                Ok(sent) if sent > 0 && !stopping.is_cancelled() => {
                    if sent < config.batch.unsigned_abs() {
                        tokio::select! {
                            () = stopping.cancelled() => {}
                            () = tokio::time::sleep_until(began + PACE) => {}
                        }
                    }
                    continue;
                }
                Ok(_) => config.poll_interval,
                Err(error) => {
                    SENDING.failed(&format_args!("{error:#}"));
                    config.poll_interval * 2
                }
            };
            tokio::select! {
                biased;
                // what was committed before the stop is sent by the step above, or by the next start
                () = stopping.cancelled() => return Ok(()),
                () = relay.0.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
}

/// Between the starts of two steps that send less than a whole batch: each costs a transaction and a flush of the log, which
/// orders wait for too. The first event after a pause leaves at once.
const PACE: Duration = Duration::from_millis(20);
/// Between two looks at how much waits.
const WATCH_EVERY: Duration = Duration::from_millis(500);

async fn step(
    db: &mut OwnConnection,
    bound: Duration,
    broker: &Broker,
    config: &OutboxConfig,
    stopping: &CancellationToken,
    watch: bool,
) -> anyhow::Result<u64> {
    let work = async |db: &mut PgConnection| {
        let sent = forward(db, broker, config, stopping).await;
        // also when the broker is away: that is when somebody looks at the figures
        if watch {
            watch_backlog(db, config.batch).await?;
        }
        sent
    };
    db.round(bound, work).await
}

/// Sends one batch; returns how many events left the outbox. The transaction stays open while the broker acknowledges,
/// bounded: its lock is what keeps a second relay from sending the same rows.
async fn forward(
    db: &mut PgConnection,
    broker: &Broker,
    config: &OutboxConfig,
    stopping: &CancellationToken,
) -> anyhow::Result<u64> {
    let mut tx = db.begin().await?;
    if !store::try_lock_relay(&mut tx, config.broker_timeout * 2).await? {
        tx.rollback().await?;
        return Ok(0);
    }
    let rows = store::read_oldest(&mut tx, config.batch).await?;
    if rows.is_empty() {
        tx.rollback().await?;
        return Ok(0);
    }
    // a span only for what is sent: an idle relay looks twice a second
    let span = tracing::info_span!("outbox.forward", batch.size = rows.len());
    carry(tx, broker, &rows, give_up(config.broker_timeout, stopping))
        .instrument(span)
        .await
}

async fn carry(
    mut tx: Transaction<'_, Postgres>,
    broker: &Broker,
    rows: &[OutboxRow],
    give_up: impl Future<Output = ()>,
) -> anyhow::Result<u64> {
    CrashPoint::EventsProducing.pass();
    let (sent, failure) = send(broker, rows, give_up).await;
    let deleted = if sent.is_empty() {
        0
    } else {
        CrashPoint::EventsAcknowledged.pass();
        store::delete_sent(&mut tx, &sent).await?
    };
    CrashPoint::EventsDeleting.pass();
    tx.commit().await?;
    CrashPoint::EventsDeleted.pass();
    SENT.inc_by(deleted);
    match failure {
        Some(cause) if deleted == 0 => Err(anyhow::anyhow!(cause)),
        _ => Ok(deleted),
    }
}

/// How long a stopping process still waits for the broker: it may be the broker that is away.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Resolves when the broker has had its time.
async fn give_up(bound: Duration, stopping: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(bound) => {}
        () = async { stopping.cancelled().await; tokio::time::sleep(LAST_WAIT).await } => {}
    }
}

/// Sends the rows and returns the ids that may be deleted: all, or per order what precedes its first failure, so that
/// what follows a gap is sent again behind it.
async fn send(
    broker: &Broker,
    rows: &[OutboxRow],
    give_up: impl Future<Output = ()>,
) -> (Vec<i64>, Option<String>) {
    let producer = broker.producer();
    let mut give_up = pin!(give_up.fuse());
    let mut failure = None;
    let mut reports: Vec<Option<(DeliveryFuture, Span)>> = Vec::with_capacity(rows.len());
    for row in rows {
        let queued = if failure.is_some() {
            None
        } else {
            enqueue(&producer, &broker.kafka.topic, row, &mut failure)
        };
        reports.push(queued);
    }
    CrashPoint::EventsProduced.pass();
    let mut arrived = Vec::with_capacity(rows.len());
    for report in reports {
        arrived.push(match report {
            None => false,
            Some((report, span)) => {
                let arrived = acknowledged(&producer, report, give_up.as_mut(), &mut failure).await;
                if !arrived {
                    span.record("otel.status_code", "ERROR");
                }
                arrived
            }
        });
    }
    if failure.is_some() {
        broker.replace_if_fatal();
    }
    let mut broken = HashSet::new();
    let mut sent = Vec::with_capacity(rows.len());
    for (row, arrived) in rows.iter().zip(arrived) {
        if !arrived {
            broken.insert(row.order);
        } else if !broken.contains(&row.order) {
            sent.push(row.id);
        }
    }
    (sent, failure)
}

fn enqueue(
    producer: &FutureProducer,
    topic: &str,
    row: &OutboxRow,
    failure: &mut Option<String>,
) -> Option<(DeliveryFuture, Span)> {
    let (key, payload) = (row.order.0.to_string(), event::payload(row));
    let span = sending(topic, row);
    let own = span.in_scope(telemetry::traceparent);
    // a trace that nobody records is passed on as it came
    let traceparent = own.as_deref().filter(|_| !span.is_none());
    let headers = kafka::headers(traceparent.or(row.traceparent.as_deref()));
    let record = FutureRecord::to(topic)
        .key(&key)
        .payload(&payload)
        .headers(headers);
    match producer.send_result(record) {
        Ok(report) => Some((report, span)),
        Err((error, _)) => {
            *failure = Some(format!("queueing an event: {error}"));
            None
        }
    }
}

/// The span of one event on its way, part of the trace of whatever caused it, if that is recorded; the consumer's links to
/// it.
fn sending(topic: &str, row: &OutboxRow) -> Span {
    if !row
        .traceparent
        .as_deref()
        .is_some_and(telemetry::is_sampled)
    {
        return Span::none();
    }
    let span = tracing::info_span!(parent: None, "outbox.send", otel.name = format!("{topic} send"), otel.kind = "producer",
        otel.status_code = Empty, order.id = row.order.0, user.id = row.user, event.sequence = row.sequence);
    if let Some(traceparent) = &row.traceparent {
        telemetry::set_parent(&span, traceparent);
    }
    span
}

/// Waits for one report. The first failure, or the bound, purges what the producer still holds: every other report then
/// comes at once, and nothing is sent behind our back.
async fn acknowledged(
    producer: &FutureProducer,
    mut report: DeliveryFuture,
    give_up: impl Future<Output = ()>,
    failure: &mut Option<String>,
) -> bool {
    let outcome = tokio::select! {
        biased;
        outcome = &mut report => outcome,
        () = give_up => {
            failure.get_or_insert_with(|| "no acknowledgement in time".into());
            purge(producer);
            report.await
        }
    };
    match outcome {
        Ok(Ok(_)) => true,
        Ok(Err((error, _))) => {
            if failure.is_none() {
                *failure = Some(format!("sending an event: {error}"));
                purge(producer);
            }
            false
        }
        Err(_) => {
            failure.get_or_insert_with(|| "the producer went away".into());
            false
        }
    }
}

fn purge(producer: &FutureProducer) {
    producer.purge(PurgeConfig::default().queue().inflight());
    // purged messages report at the next poll
    producer.flush(Timeout::After(Duration::ZERO)).ok();
}

async fn watch_backlog(db: &mut PgConnection, most: i64) -> sqlx::Result<()> {
    let (rows, age) = store::read_backlog(db, most.max(10_000)).await?;
    BACKLOG.0.set(rows);
    BACKLOG.1.set(age);
    Ok(())
}

static SENT: LazyLock<IntCounter> = LazyLock::new(|| {
    registered(IntCounter::new(
        "loms_outbox_sent_total",
        "Events that the broker has acknowledged.",
    ))
});

static BACKLOG: LazyLock<(IntGauge, Gauge)> = LazyLock::new(|| {
    let rows = IntGauge::new(
        "loms_outbox_rows",
        "Events that wait for the broker, counted up to 10,000.",
    );
    let age = Gauge::new(
        "loms_outbox_oldest_age_seconds",
        "Age of the oldest event that waits.",
    );
    (registered(rows), registered(age))
});

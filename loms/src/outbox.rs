//! Carries events from the outbox to Kafka. One relay at a time over all replicas; a row is deleted after the broker has
//! acknowledged it, so an event is sent at least once, and the first time in order.

mod broker;

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use platform::{grpc::registered, pg::OwnConnection, tasks::Tasks};
use prometheus::{Gauge, IntCounter, IntGauge};
use sqlx::{Connection as _, PgConnection, Postgres, Transaction};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub(crate) use self::broker::Broker;
use crate::{
    config::OutboxConfig,
    crash::CrashPoint,
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
                    tracing::warn!(error = %format!("{error:#}"), "events were not sent, trying again");
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
    let (sent, failure) = broker::send(broker, rows, give_up).await;
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

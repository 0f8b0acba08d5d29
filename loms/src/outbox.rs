//! Carries events from the outbox to Kafka. Over all replicas the one that has the lease sends: it reads a batch in one short
//! transaction, sends it with none open, and deletes what the broker has acknowledged in another. So an event is sent at
//! least once, and the first time in order, also if two relays send at once: migration 10 has the reasons.

mod broker;
mod partitioner;

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use platform::{
    error::StartError,
    grpc::registered,
    kafka::Partitioner,
    pg::{self, Db, Pool},
    state_log::StateLog,
    tasks::Tasks,
};
use prometheus::{Gauge, IntCounter, IntGauge};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use uuid::Uuid;

pub(crate) use self::{broker::Broker, partitioner::settle_at_start};
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

/// The least that a lease lasts: a relay that died is missed so long.
const LEASE: Duration = Duration::from_secs(10);
/// Between two renewals while the broker is waited for.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// What the reports of a batch that was given up may take.
const REPORTS: Duration = Duration::from_secs(2);
/// How long a stopping process still waits for the broker: it may be the broker that is away.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// Between the starts of two steps that send less than a whole batch: each costs a transaction and a flush of the log, which
/// orders wait for too. The first event after a pause leaves at once.
const PACE: Duration = Duration::from_millis(20);
/// Between two looks at how much waits.
const WATCH_EVERY: Duration = Duration::from_millis(500);

static SENDING: StateLog = StateLog::new("events were not sent", "events are sent again");

/// Starts the relay, which has a connection of its own; a database that is silent for longer than `bound` is given up.
pub(crate) fn start(
    db: Pool,
    bound: Duration,
    broker: Broker,
    config: OutboxConfig,
    relay: Relay,
    tasks: &Tasks,
) {
    LazyLock::force(&SENT);
    LazyLock::force(&BACKLOG);
    let worker = Worker {
        lease: lease(config.broker_timeout, bound),
        leased: Leased {
            db,
            holder: Uuid::new_v4(),
            partitioner: broker.partitioner(),
        },
        settled: false,
        broker,
        config,
        stopping: tasks.stopping(),
    };
    tasks.worker_thread("relay", worker.run(relay));
}

/// How long the lease is: from the statement that takes it, it outlasts the rest of that transaction (`bound`), the wait for
/// the broker and the reports of a batch that is given up. So two relays send at once only if one was frozen, or if the
/// server forgot the lease in a crash, and no clock but the database's is asked.
fn lease(broker_timeout: Duration, bound: Duration) -> Duration {
    LEASE.max(bound + broker_timeout + REPORTS)
}

struct Worker {
    leased: Leased,
    /// The partitioner is written down.
    settled: bool,
    lease: Duration,
    broker: Broker,
    config: OutboxConfig,
    stopping: CancellationToken,
}

/// The database as the relay that has this name sees it.
struct Leased {
    db: Pool,
    holder: Uuid,
    partitioner: Partitioner,
}

impl Worker {
    async fn run(mut self, relay: Relay) -> anyhow::Result<()> {
        let mut watched = None;
        loop {
            let began = Instant::now();
            let watch = watched.is_none_or(|last| began - last >= WATCH_EVERY);
            let sent = self.step(watch).await;
            let sent = sent.inspect(|_| SENDING.works());
            if watch {
                watched = Some(began);
            }
            let pause = match sent {
                Ok(sent) if sent > 0 && !self.stopping.is_cancelled() => {
                    if sent < self.config.batch.unsigned_abs() {
                        tokio::select! {
                            () = self.stopping.cancelled() => {}
                            () = tokio::time::sleep_until(began + PACE) => {}
                        }
                    }
                    continue;
                }
                Ok(_) => self.config.poll_interval,
                // sending nothing would be said by an alert only
                Err(error) if error.is::<StartError>() => return Err(error),
                Err(error) => {
                    SENDING.failed(&format_args!("{error:#}"));
                    self.config.poll_interval * 2
                }
            };
            tokio::select! {
                biased;
                // what was committed before the stop is sent by the step above, or by the next start
                () = self.stopping.cancelled() => break,
                () = relay.0.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        // another replica takes over at once
        if let Err(error) = self.leased.extend(Duration::ZERO).await {
            tracing::debug!(error = %error, "the lease was not given back, it lapses by itself");
        }
        Ok(())
    }

    async fn step(&mut self, watch: bool) -> anyhow::Result<u64> {
        let sent = self.forward().await;
        // also when the broker is away: that is when somebody looks at the figures
        if watch {
            self.leased.watch_backlog(self.config.batch).await?;
        }
        sent
    }

    /// Sends one batch; returns how many events left the outbox. No transaction is open while the broker acknowledges.
    async fn forward(&mut self) -> anyhow::Result<u64> {
        if !self.settled {
            self.leased.settle().await?;
            self.settled = true;
        }
        let rows = self.leased.read(self.lease, self.config.batch).await?;
        if rows.is_empty() {
            return Ok(0);
        }
        // a span only for what is sent: an idle relay looks twice a second
        let span = tracing::info_span!("outbox.forward", batch.size = rows.len());
        self.carry(&rows).instrument(span).await
    }

    async fn carry(&mut self, rows: &[OutboxRow]) -> anyhow::Result<u64> {
        CrashPoint::EventsProducing.pass();
        let (sent, failure) = self.send(rows).await;
        let deleted = if sent.is_empty() {
            0
        } else {
            CrashPoint::EventsAcknowledged.pass();
            self.leased.delete(&sent).await?
        };
        SENT.inc_by(deleted);
        match failure {
            Some(cause) if deleted == 0 => Err(anyhow::anyhow!(cause)),
            _ => Ok(deleted),
        }
    }

    /// Sends the rows, and keeps the lease until every one of them has its report: see [`broker::send`].
    async fn send(&mut self, rows: &[OutboxRow]) -> (Vec<i64>, Option<String>) {
        let (reported, lost) = (CancellationToken::new(), CancellationToken::new());
        let give_up = give_up(self.config.broker_timeout, &self.stopping, &lost);
        let sending = async {
            let sent = broker::send(&self.broker, rows, give_up).await;
            reported.cancel();
            sent
        };
        let (sent, ()) = tokio::join!(sending, self.leased.keep(self.lease, &reported, &lost));
        sent
    }
}

impl Leased {
    async fn settle(&mut self) -> anyhow::Result<()> {
        let wanted = self.partitioner;
        let work = async |db: &mut Db| partitioner::settle(db, wanted).await;
        self.db.with_connection(work).await
    }

    async fn read(&mut self, lease: Duration, batch: i64) -> pg::Result<Vec<OutboxRow>> {
        let (holder, partitioner) = (self.holder, self.partitioner.as_str());
        let work = async |db: &mut Db| {
            let mut tx = db.begin().await?;
            let rows = if store::try_lock_relay(&mut tx).await? {
                store::read_leased(&mut tx, holder, lease, batch, partitioner).await?
            } else {
                Vec::new()
            };
            tx.commit().await?;
            Ok(rows)
        };
        self.db.with_connection(work).await
    }

    async fn extend(&mut self, lease: Duration) -> pg::Result<bool> {
        let holder = self.holder;
        let work = async |db: &mut Db| store::extend_lease(db, holder, lease).await;
        self.db.repeatable(work).await
    }

    /// Renews the lease until `reported`; says it is `lost` when another relay has taken over.
    async fn keep(
        &mut self,
        lease: Duration,
        reported: &CancellationToken,
        lost: &CancellationToken,
    ) {
        loop {
            tokio::select! {
                biased;
                () = reported.cancelled() => return,
                () = tokio::time::sleep(RENEW_EVERY) => {}
            }
            match self.extend(lease).await {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!("another relay has taken the lease");
                    return lost.cancel();
                }
                // it outlasts the batch all the same, and what deletes the batch will say that the database is away
                Err(error) => tracing::debug!(error = %error, "the lease was not renewed"),
            }
        }
    }

    async fn delete(&mut self, sent: &[i64]) -> pg::Result<u64> {
        let work = async |db: &mut Db| {
            let mut tx = db.begin().await?;
            let deleted = store::delete_sent(&mut tx, sent).await?;
            CrashPoint::EventsDeleting.pass();
            tx.commit().await?;
            CrashPoint::EventsDeleted.pass();
            Ok(deleted)
        };
        self.db.with_connection(work).await
    }

    async fn watch_backlog(&mut self, batch: i64) -> pg::Result<()> {
        let work = async |db: &mut Db| store::read_backlog(db, batch.max(10_000)).await;
        let (rows, age) = self.db.repeatable(work).await?;
        BACKLOG.0.set(rows);
        BACKLOG.1.set(age);
        Ok(())
    }
}

/// Resolves when the broker has had its time, or when the events are another relay's to send.
async fn give_up(bound: Duration, stopping: &CancellationToken, lost: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(bound) => {}
        () = lost.cancelled() => {}
        () = async { stopping.cancelled().await; tokio::time::sleep(LAST_WAIT).await } => {}
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lease_outlasts_reading_waiting_and_the_last_reports() {
        let seconds = Duration::from_secs;
        assert_eq!(lease(seconds(1), seconds(4)), seconds(10));
        assert_eq!(lease(seconds(10), seconds(4)), seconds(16));
        assert!(lease(seconds(1), seconds(4)) > 3 * RENEW_EVERY);
    }
}

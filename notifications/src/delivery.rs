//! Tells what is saved and untold: at least once, an order's events one after another, different orders side by side.
//! One replica sends, the holder of the lease; a step takes what is due, tries it, and writes down what came of it.

use std::{sync::Arc, sync::LazyLock, time::Duration};

use fail::fail_point;
use futures::future::join_all;
use platform::{error::StartError, grpc::registered, pool::Pool, telemetry};
use prometheus::{IntCounterVec, Opts};
use sqlx::PgConnection;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::{
    config::{Config, DeliveryConfig},
    message::Due,
    store,
    telegram::Channel,
    verdict::{Verdict, backoff, judge, overdue},
};

/// Messages that one step takes when they only go to the log.
const LOG_BATCH: u32 = 500;
/// What a step waits after the database failed, at first and at most.
const DATABASE_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

static DELIVERIES: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let opts = Opts::new(
        "notifications_counter_deliveries_total",
        "Attempts to tell a message, and messages given up, by outcome.",
    );
    registered(IntCounterVec::new(opts, &["outcome"]))
});

/// The sender.
pub struct Delivery {
    pool: Pool,
    channel: Channel,
    /// The bound of one attempt.
    timeout: Duration,
    config: DeliveryConfig,
    /// This replica's name in the lease.
    holder: Uuid,
    /// Notified when something was saved.
    saved: Arc<Notify>,
    leased_until: Instant,
    paused_until: Instant,
    /// Tried, and not written down because the database went away: kept, so that it is not told twice.
    unwritten: Vec<(Due, Verdict)>,
}

/// What a step leads to.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// There may be more.
    Step,
    /// Nothing is due; something saved wakes the sender.
    Idle,
    /// Nothing to be done before that.
    Rest(Duration),
}

/// What a look at the table says.
enum Look {
    Due(Vec<Due>),
    Nothing(Next),
}

impl Delivery {
    /// Opens nothing: Telegram away at start does not stop the start.
    pub fn new(config: &Config, pool: Pool, saved: Arc<Notify>) -> Result<Delivery, StartError> {
        for outcome in ["told", "failed", "given_up", "paused"] {
            DELIVERIES.with_label_values(&[outcome]);
        }
        // renewed when half of it is over, it must outlast the attempts begun just before
        if config.delivery.lease < 2 * config.telegram.timeout {
            return Err(StartError::new(
                "delivery.lease is less than twice telegram.timeout, two replicas could send at once",
                "make it longer",
            ));
        }
        let now = Instant::now();
        Ok(Delivery {
            pool,
            channel: Channel::new(&config.telegram)?,
            timeout: config.telegram.timeout,
            config: config.delivery.clone(),
            holder: Uuid::new_v4(),
            saved,
            leased_until: now,
            paused_until: now,
            unwritten: Vec::new(),
        })
    }

    /// Sends until told to stop, then gives the lease back.
    pub async fn run(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0;
        while !stopping.is_cancelled() {
            let next = match self.step().await {
                Ok(next) => {
                    failures = 0;
                    next
                }
                Err(error) => {
                    failures += 1;
                    tracing::warn!(error = %error, failures, "delivery step failed");
                    Next::Rest(backoff(DATABASE_BACKOFF.0, DATABASE_BACKOFF.1, failures))
                }
            };
            let saved = self.saved.clone();
            match next {
                Next::Step => {}
                Next::Idle => tokio::select! {
                    () = stopping.cancelled() => {}
                    () = saved.notified() => {}
                    () = tokio::time::sleep(self.config.poll) => {}
                },
                Next::Rest(pause) => tokio::select! {
                    () = stopping.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                },
            }
        }
        let pool = self.pool.clone();
        let leave = async |db: &mut PgConnection| {
            self.write_down(db).await?;
            store::release_lease(db, self.holder).await
        };
        pool.round(leave).await?;
        Ok(())
    }

    async fn step(&mut self) -> Result<Next, sqlx::Error> {
        // Telegram may take seconds: no connection is kept over it
        let pool = self.pool.clone();
        let due = match pool.round(async |db| self.look(db).await).await? {
            Look::Due(due) => due,
            Look::Nothing(next) => return Ok(next),
        };
        if self.leased_until.saturating_duration_since(Instant::now()) < self.timeout {
            // the database took so long that an attempt could outlast the lease
            return Ok(Next::Step);
        }
        let verdicts = join_all(due.iter().map(|due| self.attempt(due))).await;
        self.unwritten.extend(due.into_iter().zip(verdicts));
        pool.round(async |db| self.write_down(db).await).await?;
        Ok(Next::Step)
    }

    /// What there is to send, if this replica is the one that sends.
    async fn look(&mut self, db: &mut PgConnection) -> Result<Look, sqlx::Error> {
        self.write_down(db).await?;
        if !self.hold_lease(db).await? {
            return Ok(Look::Nothing(Next::Rest(self.config.lease / 3)));
        }
        let pause = self.paused_until.saturating_duration_since(Instant::now());
        if !pause.is_zero() {
            // not longer: the lease has to be renewed meanwhile
            let rest = pause.min(self.config.lease / 3);
            return Ok(Look::Nothing(Next::Rest(rest)));
        }
        let limit = match self.channel {
            Channel::Telegram(_) => self.config.in_flight,
            Channel::Log => LOG_BATCH,
        };
        let age = self.config.give_up_after.as_secs_f64();
        let due = store::list_due(db, age, i64::from(limit)).await?;
        Ok(if due.is_empty() {
            Look::Nothing(Next::Idle)
        } else {
            Look::Due(due)
        })
    }

    /// Whether this replica may send for half a lease from now.
    async fn hold_lease(&mut self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        let asked_at = Instant::now();
        if self.leased_until.saturating_duration_since(asked_at) > self.config.lease / 2 {
            return Ok(true);
        }
        let held = self.leased_until > asked_at;
        let lease = self.config.lease.as_secs_f64();
        let Some(pause) = store::take_lease(connection, self.holder, lease).await? else {
            if held {
                tracing::warn!("lease lost, another replica sends");
            }
            self.leased_until = asked_at;
            return Ok(false);
        };
        // from before the question: never later than the database has it
        self.leased_until = asked_at + self.config.lease;
        self.paused_until = self
            .paused_until
            .max(asked_at + Duration::from_secs_f64(pause));
        if !held {
            tracing::info!(holder = %self.holder, "lease taken, this replica sends");
        }
        Ok(true)
    }

    async fn attempt(&self, due: &Due) -> Verdict {
        let span = tracing::info_span!("delivery.tell", order.id = due.order);
        if let Some(traceparent) = &due.traceparent {
            // one message is about one order: whoever follows that order's trace finds what became of it
            telemetry::set_parent(&span, traceparent);
        }
        let attempt = async {
            if due.overdue {
                return log(due, overdue(due, self.config.give_up_after));
            }
            let outcome = self.channel.tell(&due.message).await;
            fail_point!("message-sent", |_| std::process::abort());
            log(due, judge(due, outcome, &self.config))
        };
        attempt.instrument(span).await
    }

    /// One transaction for the outcomes of a step. A crash before it means that they are told again: at least once.
    async fn write_down(&mut self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        fail_point!("messages-marking", |_| std::process::abort());
        let mut transaction = sqlx::Connection::begin(connection).await?;
        let told = |(due, verdict): &(Due, Verdict)| (*verdict == Verdict::Told).then_some(due.id);
        let told: Vec<i64> = self.unwritten.iter().filter_map(told).collect();
        if !told.is_empty() {
            store::mark_told(&mut transaction, &told).await?;
        }
        let mut pause = Duration::ZERO;
        for (due, verdict) in &self.unwritten {
            match verdict {
                Verdict::Told => {}
                Verdict::Again { error, wait } => {
                    let wait = wait.as_secs_f64();
                    store::postpone(&mut transaction, due.id, due.order, error, wait).await?;
                }
                Verdict::GivenUp { attempts, reason } => {
                    store::give_up(&mut transaction, due.id, *attempts, reason).await?;
                }
                Verdict::Paused(asked) => pause = pause.max(*asked),
            }
        }
        if !pause.is_zero() {
            store::pause_sender(&mut transaction, pause.as_secs_f64()).await?;
        }
        transaction.commit().await?;
        if !pause.is_zero() {
            tracing::warn!(pause_s = pause.as_secs(), "telegram asks to wait");
            self.paused_until = Instant::now() + pause;
        }
        for (_, verdict) in self.unwritten.drain(..) {
            DELIVERIES.with_label_values(&[outcome(&verdict)]).inc();
        }
        Ok(())
    }
}

fn log(due: &Due, verdict: Verdict) -> Verdict {
    match &verdict {
        Verdict::Again { error, .. } => {
            tracing::info!(order.id = due.order, attempts = due.attempts + 1, error = %error, "message not told yet");
        }
        Verdict::GivenUp { attempts, reason } => {
            tracing::warn!(order.id = due.order, attempts, reason = %reason, "message given up");
        }
        Verdict::Told | Verdict::Paused(_) => {}
    }
    verdict
}

/// How it is counted, after it is written down.
fn outcome(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Told => "told",
        Verdict::Again { .. } => "failed",
        Verdict::GivenUp { .. } => "given_up",
        Verdict::Paused(_) => "paused",
    }
}

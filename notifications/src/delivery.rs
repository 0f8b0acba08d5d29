//! Tells what is saved and untold: at least once, an order's events one after another, different orders side by side.
//! One replica sends, the holder of the lease; a step takes what is due, tries it, and writes down what came of it.

use std::{sync::Arc, sync::LazyLock, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::future::join_all;
use platform::{error::StartError, grpc::registered, telemetry};
use prometheus::{IntCounterVec, Opts};
use sqlx::{PgConnection, PgPool};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::{
    config::{Config, DeliveryConfig},
    message::Due,
    store,
    telegram::{Channel, Outcome},
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
    pool: PgPool,
    channel: Channel,
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

/// What is written down about a message that was due.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    Told,
    Again { error: String, wait: Duration },
    GivenUp { attempts: i32, reason: String },
    Paused(Duration),
}

impl Delivery {
    /// Opens nothing: Telegram away at start does not stop the start.
    pub fn new(config: &Config, pool: PgPool, saved: Arc<Notify>) -> Result<Delivery, StartError> {
        LazyLock::force(&DELIVERIES);
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
        let mut connection = self.pool.acquire().await?;
        self.write_down(&mut connection).await?;
        store::release_lease(&mut connection, self.holder).await?;
        Ok(())
    }

    async fn step(&mut self) -> Result<Next, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        self.write_down(&mut connection).await?;
        if !self.hold_lease(&mut connection).await? {
            return Ok(Next::Rest(self.config.lease / 3));
        }
        let pause = self.paused_until.saturating_duration_since(Instant::now());
        if !pause.is_zero() {
            // not longer: the lease has to be renewed meanwhile
            return Ok(Next::Rest(pause.min(self.config.lease / 3)));
        }
        let limit = match self.channel {
            Channel::Telegram(_) => self.config.in_flight,
            Channel::Log => LOG_BATCH,
        };
        let age = self.config.give_up_after.as_secs_f64();
        let due = store::list_due(&mut connection, age, i64::from(limit)).await?;
        // Telegram may take seconds: the connection is not kept over it
        drop(connection);
        if due.is_empty() {
            return Ok(Next::Idle);
        }
        let verdicts = join_all(due.iter().map(|due| self.attempt(due))).await;
        self.unwritten.extend(due.into_iter().zip(verdicts));
        let mut connection = self.pool.acquire().await?;
        self.write_down(&mut connection).await?;
        Ok(Next::Step)
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
        if due.overdue {
            return overdue(due, self.config.give_up_after);
        }
        let span = tracing::info_span!("delivery.tell", otel.kind = "client", order.id = due.order);
        if let Some(traceparent) = &due.traceparent {
            telemetry::link_to(&span, traceparent);
        }
        let outcome = self.channel.tell(&due.message).instrument(span).await;
        judge(due, outcome, &self.config)
    }

    /// One transaction for the outcomes of a step. A crash before it means that they are told again: at least once.
    async fn write_down(&mut self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
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
                    store::postpone(&mut transaction, due.id, error, wait.as_secs_f64()).await?;
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
        for (due, verdict) in self.unwritten.drain(..) {
            note(&due, &verdict);
        }
        Ok(())
    }
}

/// What an attempt means for its message.
fn judge(due: &Due, outcome: Outcome, config: &DeliveryConfig) -> Verdict {
    let attempts = due.attempts.saturating_add(1);
    match outcome {
        Outcome::Told => Verdict::Told,
        Outcome::Paused(pause) => Verdict::Paused(pause),
        Outcome::Refused(reason) => Verdict::GivenUp { attempts, reason },
        Outcome::Failed(error) => {
            let failures = u32::try_from(attempts).unwrap_or(u32::MAX);
            if failures >= config.max_attempts {
                let reason = format!("failed {attempts} times, last: {error}");
                return Verdict::GivenUp { attempts, reason };
            }
            let wait = backoff(config.backoff, config.longest_backoff, failures);
            Verdict::Again { error, wait }
        }
    }
}

fn overdue(due: &Due, age: Duration) -> Verdict {
    let last = due
        .last_error
        .as_ref()
        .map(|error| format!(", last: {error}"));
    let reason = format!(
        "older than {} s after {} attempts{}",
        age.as_secs(),
        due.attempts,
        last.unwrap_or_default(),
    );
    Verdict::GivenUp {
        attempts: due.attempts,
        reason,
    }
}

/// Doubled with each failure up to `longest`, plus up to as much again by chance, so that what failed together is not
/// tried together.
fn backoff(first: Duration, longest: Duration, failures: u32) -> Duration {
    let mut waits = ExponentialBuilder::default()
        .with_min_delay(first)
        .with_max_delay(longest)
        .with_jitter()
        .without_max_times()
        .build();
    // 2^32 times any first wait is beyond any longest one
    let nth = failures.clamp(1, 32) as usize - 1;
    waits.nth(nth).unwrap_or(longest)
}

/// Counts and logs, after it is written down.
fn note(due: &Due, verdict: &Verdict) {
    let outcome = match verdict {
        Verdict::Told => "told",
        Verdict::Again { error, .. } => {
            tracing::info!(order.id = due.order, attempts = due.attempts + 1, error = %error, "message not told yet");
            "failed"
        }
        Verdict::GivenUp { attempts, reason } => {
            tracing::warn!(order.id = due.order, attempts, reason = %reason, "message given up");
            "given_up"
        }
        Verdict::Paused(_) => "paused",
    };
    DELIVERIES.with_label_values(&[outcome]).inc();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(attempts: i32) -> Due {
        Due {
            id: 1,
            order: 42,
            message: "order 42 is payed".to_owned(),
            attempts,
            last_error: Some("HTTP 500".to_owned()),
            traceparent: None,
            overdue: false,
        }
    }

    #[test]
    fn failures_end_after_the_last_attempt() {
        let config = DeliveryConfig {
            max_attempts: 3,
            ..DeliveryConfig::default()
        };
        let failed = || Outcome::Failed("HTTP 500".to_owned());
        assert!(matches!(
            judge(&due(0), failed(), &config),
            Verdict::Again { .. }
        ));
        assert!(matches!(
            judge(&due(1), failed(), &config),
            Verdict::Again { .. }
        ));
        let reason = "failed 3 times, last: HTTP 500".to_owned();
        assert_eq!(
            judge(&due(2), failed(), &config),
            Verdict::GivenUp {
                attempts: 3,
                reason
            }
        );
    }

    #[test]
    fn a_pause_is_no_attempt_and_a_refusal_is_final() {
        let config = DeliveryConfig {
            max_attempts: 1,
            ..DeliveryConfig::default()
        };
        let pause = Duration::from_secs(3);
        assert_eq!(
            judge(&due(9), Outcome::Paused(pause), &config),
            Verdict::Paused(pause)
        );
        let reason = "HTTP 400".to_owned();
        let refused = Outcome::Refused(reason.clone());
        assert_eq!(
            judge(&due(0), refused, &config),
            Verdict::GivenUp {
                attempts: 1,
                reason
            }
        );
    }

    #[test]
    fn what_is_too_old_keeps_its_last_error() {
        let Verdict::GivenUp {
            attempts: 2,
            reason,
        } = overdue(&due(2), Duration::from_secs(3600))
        else {
            panic!("given up with its attempts");
        };
        assert_eq!(reason, "older than 3600 s after 2 attempts, last: HTTP 500");
    }

    #[test]
    fn waits_double_up_to_the_longest_with_jitter() {
        let (first, longest) = (Duration::from_secs(5), Duration::from_secs(600));
        for (failures, base) in [
            (0, 5),
            (1, 5),
            (2, 10),
            (3, 20),
            (8, 600),
            (30, 600),
            (u32::MAX, 600),
        ] {
            let wait = backoff(first, longest, failures);
            let base = Duration::from_secs(base);
            assert!(wait >= base && wait <= 2 * base, "{failures}: {wait:?}");
        }
    }
}

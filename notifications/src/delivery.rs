//! Tells what is saved and untold: at least once, an order's events one after another, different orders side by side.
//! One replica sends, the holder of the lease; a step writes down what came of the messages that have landed, and sends more
//! on their way (`flights`).

use std::{sync::Arc, sync::LazyLock, time::Duration};

use fail::fail_point;
use platform::{
    error::StartError,
    grpc::registered,
    pg::{self, Db, Failure, Pool},
    state_log::StateLog,
};
use prometheus::{IntCounterVec, Opts};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    config::{Config, DeliveryConfig},
    flights::{Flights, Landed},
    message::Due,
    store,
    telegram::Channel,
    verdict::{Verdict, backoff},
};

/// What a step waits after the database failed, at first and at most.
const DATABASE_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

static STEPS: StateLog = StateLog::new("delivery step failed", "messages are delivered again");

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
    unwritten: Vec<Landed>,
}

/// What a step leads to.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// There may be more.
    Step,
    /// Nothing more is due; something saved wakes the sender, and what lands.
    Idle,
    /// Nothing to be done before that, unless something lands.
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

    /// Sends until told to stop, then lets what is on its way land and gives the lease back.
    pub async fn run(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut flights = Flights::new(self.channel.clone(), self.config.clone());
        let mut failures = 0;
        while !stopping.is_cancelled() {
            let next = match self.step(&mut flights).await {
                Ok(next) => {
                    STEPS.works();
                    failures = 0;
                    next
                }
                Err(error) => {
                    failures += 1;
                    STEPS.failed(&error);
                    Next::Rest(backoff(DATABASE_BACKOFF.0, DATABASE_BACKOFF.1, failures))
                }
            };
            let (pause, idle) = match next {
                Next::Step => continue,
                Next::Idle => (self.config.poll, true),
                Next::Rest(pause) => (pause, false),
            };
            tokio::select! {
                () = stopping.cancelled() => {}
                () = flights.land() => {}
                () = self.saved.notified(), if idle => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        flights.land_all().await;
        self.unwritten.extend(flights.take_landed());
        let pool = self.pool.clone();
        let leave = async |db: &mut Db| {
            self.write_down(db).await?;
            pg::Result::Ok(store::release_lease(db, self.holder).await?)
        };
        pool.with_connection(leave).await?;
        Ok(())
    }

    /// Writes down what has landed and sends what is due, as much as there is room for.
    async fn step(&mut self, flights: &mut Flights) -> pg::Result<Next> {
        self.unwritten.extend(flights.take_landed());
        let (limit, room) = (flights.limit(), flights.room());
        // Telegram may take seconds: no connection is kept over it
        let pool = self.pool.clone();
        let look = pool.with_connection(async |db| self.look(db, limit, room).await);
        let mut due = match flights.during(look).await? {
            Look::Due(due) => due,
            Look::Nothing(next) => return Ok(next),
        };
        let lease = self.leased_until.saturating_duration_since(Instant::now());
        if lease < self.timeout || flights.asked_to_wait() {
            // the database took so long that an attempt could outlast the lease, or that a 429 came meanwhile
            return Ok(Next::Step);
        }
        // what is on its way is still untold for the table
        due.retain(|due| !flights.has(due.order));
        due.truncate(room);
        if due.is_empty() {
            return Ok(Next::Idle);
        }
        let full = due.len() == room;
        flights.launch(due);
        Ok(if full {
            Next::Rest(self.config.lease / 3)
        } else {
            Next::Idle
        })
    }

    /// What there is to send, if this replica is the one that sends.
    async fn look(&mut self, db: &mut Db, limit: u32, room: usize) -> pg::Result<Look> {
        self.write_down(db).await?;
        // not longer: the lease has to be renewed meanwhile
        let rest = self.config.lease / 3;
        if !self.hold_lease(db).await? || room == 0 {
            return Ok(Look::Nothing(Next::Rest(rest)));
        }
        let pause = self.paused_until.saturating_duration_since(Instant::now());
        if !pause.is_zero() {
            return Ok(Look::Nothing(Next::Rest(pause.min(rest))));
        }
        let age = self.config.give_up_after.as_secs_f64();
        // with what is on its way, which is among them
        let due = store::list_due(db, age, i64::from(limit)).await?;
        Ok(Look::Due(due))
    }

    /// Whether this replica may send for half a lease from now.
    async fn hold_lease(&mut self, connection: &mut Db) -> pg::Result<bool> {
        let asked_at = Instant::now();
        if self.leased_until.saturating_duration_since(asked_at) > self.config.lease / 2 {
            return Ok(true);
        }
        let held = self.leased_until > asked_at;
        let lease = self.config.lease.as_secs_f64();
        // a BEGIN replaces a connection that broke while it rested
        let mut tx = connection.begin().await?;
        let taken = store::take_lease(&mut tx, self.holder, lease).await?;
        tx.commit().await?;
        let Some(pause) = taken else {
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

    /// One transaction for all that has landed. A crash before it means that they are told again: at least once.
    async fn write_down(&mut self, connection: &mut Db) -> pg::Result<()> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        fail_point!("messages-marking", |_| std::process::abort());
        match store_all(connection, &self.unwritten).await {
            Err(error) if error.failure() == Failure::Refused => {
                error.log();
                store_each(connection, &self.unwritten).await?;
            }
            stored => stored?,
        }
        let pause = pause_of(&self.unwritten);
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

/// The longest pause that Telegram has asked for.
fn pause_of(landed: &[Landed]) -> Duration {
    let asked = landed.iter().filter_map(|(_, verdict)| match verdict {
        Verdict::Paused(asked) => Some(*asked),
        _ => None,
    });
    asked.max().unwrap_or_default()
}

/// Writes down what attempts came to, in one transaction.
async fn store_all(db: &mut Db, landed: &[Landed]) -> pg::Result<()> {
    let mut transaction = db.begin().await?;
    let told = |(due, verdict): &Landed| (*verdict == Verdict::Told).then_some(due.id);
    let told: Vec<i64> = landed.iter().filter_map(told).collect();
    if !told.is_empty() {
        store::mark_told(&mut transaction, &told).await?;
    }
    for (due, verdict) in landed {
        match verdict {
            Verdict::Told | Verdict::Paused(_) => {}
            Verdict::Again { error, wait } => {
                let wait = wait.as_secs_f64();
                store::postpone(&mut transaction, due, error, wait).await?;
            }
            Verdict::GivenUp { attempts, reason } => {
                store::give_up(&mut transaction, due.id, *attempts, reason).await?;
            }
        }
    }
    let pause = pause_of(landed);
    if !pause.is_zero() {
        store::pause_sender(&mut transaction, pause.as_secs_f64()).await?;
    }
    transaction.commit().await
}

/// The same one by one, after PostgreSQL refused one of them: that one is given up without its
/// words.
async fn store_each(db: &mut Db, landed: &[Landed]) -> pg::Result<()> {
    for one in landed {
        match store_all(db, std::slice::from_ref(one)).await {
            Err(error) if error.failure() == Failure::Refused => {
                tracing::error!(message.id = one.0.id, error = %error, "result of a message refused");
                let given_up = Verdict::GivenUp {
                    attempts: one.0.attempts.saturating_add(1),
                    reason: "what it came to could not be stored".to_owned(),
                };
                store_all(db, &[(one.0.clone(), given_up)]).await?;
            }
            stored => stored?,
        }
    }
    Ok(())
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

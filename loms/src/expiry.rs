//! Cancels what was not paid in time. Time is the database's; any number of replicas sweep, and none waits for another.

use std::{collections::HashMap, sync::LazyLock, time::Duration};

use platform::{
    grpc::registered,
    pg::{self, Db, Failure, Pool, Tx},
    state_log::StateLog,
    tasks::Tasks,
    telemetry,
};
use prometheus::{Histogram, HistogramOpts};
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::{
    crash::CrashPoint,
    order::{Event, OrderId, Status},
    orders::{Change, count_transition, settle},
    outbox::Relay,
    store::orders as store,
};

/// The longest sleep: a deadline that another replica has just written is noticed this late at most.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// The shortest sleep after a sweep that found nothing: rows that somebody else has locked look due until he commits.
const SHORTEST_SLEEP: Duration = Duration::from_millis(50);
/// The longest wait for a row of stock: far more than a batch holds it, and the rows that the sweep has by then are missed.
const LONGEST_WAIT: Duration = Duration::from_millis(250);

/// After a sweep that leaves more to do, of the time that it took: an outage makes a hundred thousand orders due at once,
/// and the sweeper holds the stock that new orders wait for.
const REST: f64 = 0.65;

/// An order that cannot be cancelled is left alone for so long: its rows are not what they must be,
/// until an operator mends them, and the others go on.
const LEFT_OUT: Duration = Duration::from_secs(60);
/// Orders that are left out at once; more of them are tried with the others.
const MOST_LEFT_OUT: usize = 1_000;

static SWEEPS: StateLog = StateLog::new("sweep failed", "unpaid orders are swept again");

/// Starts the sweeper, which has a connection of its own.
pub(crate) fn start(db: Pool, batch: i64, relay: Relay, tasks: &Tasks) {
    LazyLock::force(&LATENESS);
    let stopping = tasks.stopping();
    let mut sweeper = Sweeper {
        batch,
        relay,
        left_out: HashMap::new(),
    };
    tasks.worker("expiry", async move {
        loop {
            let began = Instant::now();
            let swept = sweeper.step(&db).await;
            let pause = match swept.inspect(|_| SWEEPS.works()) {
                Ok(None) => began.elapsed().mul_f64(REST),
                Ok(Some(pause)) => pause,
                Err(error) => {
                    SWEEPS.failed(&error);
                    LONGEST_SLEEP
                }
            };
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
}

struct Sweeper {
    batch: i64,
    relay: Relay,
    /// Orders that could not be cancelled, and when they are tried again.
    left_out: HashMap<OrderId, Instant>,
}

/// An order, and by how many seconds it is late.
type Due = Vec<(OrderId, f64)>;

impl Sweeper {
    /// Sweeps once. `None`: more may be due; else how long to sleep.
    async fn step(&mut self, db: &Pool) -> pg::Result<Option<Duration>> {
        self.left_out.retain(|_, until| *until > Instant::now());
        let work = async |db: &mut Db| match self.sweep(db).await? {
            0 => until_next_deadline(db).await.map(Some),
            _ => Ok(None),
        };
        let pause = db.with_connection(work).await?;
        // what is left out is due, and would be looked for at once
        Ok(pause.map(|pause| match self.left_out.is_empty() {
            true => pause,
            false => LONGEST_SLEEP,
        }))
    }

    /// Cancels one batch of due orders; returns how many.
    async fn sweep(&mut self, db: &mut Db) -> pg::Result<usize> {
        let mut tried = Due::new();
        let swept = match self.cancel_oldest(db, &mut tried).await {
            Err(error) if error.failure() == Failure::Locked => {
                self.cancel_free(db, &mut tried).await
            }
            swept => swept,
        };
        let cancelled = match swept {
            Err(error) if is_of_its_rows(&error) => self.cancel_one_by_one(db, &tried).await?,
            swept => swept.map(|()| tried)?,
        };
        if cancelled.is_empty() {
            return Ok(0);
        }
        CrashPoint::OrderExpired.pass();
        self.relay.wake();
        count_transition(Status::Cancelled, cancelled.len() as u64);
        for (_, late) in &cancelled {
            LATENESS.observe(late.max(0.0));
        }
        tracing::info!(orders = cancelled.len(), "unpaid orders cancelled");
        Ok(cancelled.len())
    }

    async fn cancel_oldest(&self, db: &mut Db, due: &mut Due) -> pg::Result<()> {
        let mut tx = db.begin().await?;
        store::wait_at_most(&mut tx, LONGEST_WAIT).await?;
        *due = self.wanted(store::lock_due_orders(&mut tx, self.limit()).await?);
        cancel(tx, due).await
    }

    /// Cancels orders whose stock no other session has locked: a locked row keeps only those
    /// waiting that need it. Here the stock is locked before the orders; SKIP LOCKED never waits,
    /// so that no order of locks is broken.
    async fn cancel_free(&self, db: &mut Db, due: &mut Due) -> pg::Result<()> {
        let mut tx = db.begin().await?;
        let free = store::lock_free_stock_of_due_orders(&mut tx).await?;
        let locked = store::lock_due_orders_on(&mut tx, &free, self.limit()).await?;
        *due = self.wanted(locked);
        cancel(tx, due).await
    }

    /// After a batch of which one order's rows are not what they must be: that order is told by
    /// name and left out.
    async fn cancel_one_by_one(&mut self, db: &mut Db, due: &Due) -> pg::Result<Due> {
        let mut cancelled = Due::new();
        for (order, late) in due {
            match cancel_alone(db, *order, *late).await {
                Ok(true) => cancelled.push((*order, *late)),
                Ok(false) => {}
                Err(error) if is_of_its_rows(&error) => {
                    let span = tracing::error_span!("expiry.cancel", order.id = order.0);
                    span.in_scope(|| error.log());
                    if self.left_out.len() < MOST_LEFT_OUT {
                        self.left_out.insert(*order, Instant::now() + LEFT_OUT);
                    }
                }
                // it is due in the next sweep, as the rest is
                Err(error) if cancelled.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(cancelled)
    }

    /// As many as are wanted, besides those that are left out.
    fn limit(&self) -> i64 {
        self.batch.saturating_add(self.left_out.len() as i64)
    }

    fn wanted(&self, mut due: Due) -> Due {
        due.retain(|(order, _)| !self.left_out.contains_key(order));
        due
    }
}

/// Whether it will be the same next time: the rows themselves are wrong.
fn is_of_its_rows(error: &pg::Error) -> bool {
    matches!(error.failure(), Failure::Invariant | Failure::Refused)
}

/// Cancels an order that was due. `false`: it is not any more.
async fn cancel_alone(db: &mut Db, order: OrderId, late: f64) -> pg::Result<bool> {
    let mut tx = db.begin().await?;
    store::wait_at_most(&mut tx, LONGEST_WAIT).await?;
    if store::lock_order(&mut tx, order).await? != Some(Status::AwaitingPayment) {
        tx.rollback().await?;
        return Ok(false);
    }
    cancel(tx, &vec![(order, late)]).await?;
    Ok(true)
}

async fn cancel(mut tx: Tx<'_>, due: &Due) -> pg::Result<()> {
    if due.is_empty() {
        return tx.rollback().await;
    }
    let span = tracing::info_span!("expiry.cancel", batch.size = due.len());
    let cancelled = async {
        // nobody called: the trace of these events begins here
        let traceparent = telemetry::traceparent();
        let change = |(order, _): &(OrderId, f64)| Change {
            order: *order,
            traceparent: traceparent.clone(),
        };
        let changes: Vec<Change> = due.iter().map(change).collect();
        settle(&mut tx, &changes, Event::Expire).await?;
        CrashPoint::OrderExpiring.pass();
        tx.commit().await
    };
    cancelled.instrument(span).await
}

async fn until_next_deadline(db: &mut Db) -> pg::Result<Duration> {
    let seconds = store::seconds_to_next_deadline(db).await?;
    Ok(sleep_before(seconds, rand::random()))
}

/// Until the next deadline, if any, within the bounds; `chance`, 0 to 1, keeps replicas from looking at the same moments.
fn sleep_before(deadline_in_seconds: Option<f64>, chance: f64) -> Duration {
    let until = deadline_in_seconds.map_or(LONGEST_SLEEP, |seconds| {
        Duration::try_from_secs_f64(seconds.clamp(0.0, LONGEST_SLEEP.as_secs_f64()))
            .unwrap_or_default()
    });
    until.clamp(
        SHORTEST_SLEEP + SHORTEST_SLEEP.mul_f64(chance),
        LONGEST_SLEEP,
    )
}

static LATENESS: LazyLock<Histogram> = LazyLock::new(|| {
    let opts = HistogramOpts::new(
        "loms_expiry_lateness_seconds",
        "Time from an order's deadline to its cancellation.",
    );
    registered(Histogram::with_opts(opts.buckets(vec![
        0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0,
    ])))
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sleeps_until_the_next_deadline_and_within_its_bounds() {
        let sleep = |seconds, chance| sleep_before(seconds, chance).as_millis();
        assert_eq!(sleep(None, 0.5), 500);
        assert_eq!(sleep(Some(0.2), 0.5), 200);
        assert_eq!(sleep(Some(600.0), 0.5), 500);
        assert_eq!(sleep(Some(1e300), 0.5), 500);
        // passed, and still there: somebody has it locked
        assert_eq!(sleep(Some(-3.0), 0.0), 50);
        assert_eq!(sleep(Some(0.01), 1.0), 100);
    }
}

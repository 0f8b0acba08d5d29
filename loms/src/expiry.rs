//! Cancels what was not paid in time. Time is the database's; any number of replicas sweep, and none waits for another.

use std::{sync::LazyLock, time::Duration};

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

static SWEEPS: StateLog = StateLog::new("sweep failed", "unpaid orders are swept again");

/// Starts the sweeper, which has a connection of its own.
pub(crate) fn start(db: Pool, batch: i64, relay: Relay, tasks: &Tasks) {
    LazyLock::force(&LATENESS);
    let stopping = tasks.stopping();
    tasks.worker("expiry", async move {
        loop {
            let began = Instant::now();
            let swept = step(&db, batch, &relay).await;
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

/// Sweeps once. `None`: more may be due; else how long to sleep.
async fn step(db: &Pool, batch: i64, relay: &Relay) -> pg::Result<Option<Duration>> {
    let work = async |db: &mut Db| match sweep(db, batch, relay).await? {
        0 => until_next_deadline(db).await.map(Some),
        _ => Ok(None),
    };
    db.with_connection(work).await
}

/// Cancels one batch of due orders; returns how many.
async fn sweep(db: &mut Db, batch: i64, relay: &Relay) -> pg::Result<usize> {
    let due = match cancel_oldest(db, batch).await {
        Err(error) if error.failure() == Failure::Locked => cancel_free(db, batch).await?,
        done => done?,
    };
    if due.is_empty() {
        return Ok(0);
    }
    CrashPoint::OrderExpired.pass();
    relay.wake();
    count_transition(Status::Cancelled, due.len() as u64);
    for (_, late) in &due {
        LATENESS.observe(late.max(0.0));
    }
    tracing::info!(orders = due.len(), "unpaid orders cancelled");
    Ok(due.len())
}

/// An order, and by how many seconds it is late.
type Due = Vec<(OrderId, f64)>;

async fn cancel_oldest(db: &mut Db, batch: i64) -> pg::Result<Due> {
    let mut tx = db.begin().await?;
    store::wait_at_most(&mut tx, LONGEST_WAIT).await?;
    let due = store::lock_due_orders(&mut tx, batch).await?;
    cancel(tx, due).await
}

/// Cancels orders whose stock nobody else has locked: whoever sits on a row keeps only those waiting that need it. Here the
/// stock is locked before the orders; SKIP LOCKED never waits, so that no order of locks is broken.
async fn cancel_free(db: &mut Db, batch: i64) -> pg::Result<Due> {
    let mut tx = db.begin().await?;
    let free = store::lock_free_stock_of_due_orders(&mut tx).await?;
    let due = store::lock_due_orders_on(&mut tx, &free, batch).await?;
    cancel(tx, due).await
}

async fn cancel(mut tx: Tx<'_>, due: Due) -> pg::Result<Due> {
    if due.is_empty() {
        tx.rollback().await?;
        return Ok(due);
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
    cancelled.instrument(span).await?;
    Ok(due)
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

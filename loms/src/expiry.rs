//! Cancels what was not paid in time. Time is the database's; any number of replicas sweep, and none waits for another.

use std::{sync::LazyLock, time::Duration};

use platform::{grpc::registered, pg::OwnConnection, tasks::Tasks};
use prometheus::{Histogram, HistogramOpts};
use sqlx::{Connection as _, PgConnection};

use crate::{
    order::{Event, OrderId, Status},
    orders::{count_transition, settle},
    outbox::Relay,
    store::orders as store,
};

/// The longest sleep: a deadline that another replica has just written is noticed this late at most.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// The shortest sleep after a sweep that found nothing: rows that somebody else has locked look due until he commits.
const SHORTEST_SLEEP: Duration = Duration::from_millis(50);

/// Starts the sweeper, which has a connection of its own; a sweep that takes longer than `bound` has lost its server.
pub(crate) fn start(
    mut db: OwnConnection,
    bound: Duration,
    batch: i64,
    relay: Relay,
    tasks: &Tasks,
) {
    let stopping = tasks.stopping();
    tasks.worker("expiry", async move {
        loop {
            let pause = match step(&mut db, bound, batch, &relay).await {
                Ok(None) if !stopping.is_cancelled() => continue,
                Ok(pause) => pause.unwrap_or(SHORTEST_SLEEP),
                Err(error) => {
                    tracing::warn!(error = %error, "sweep failed");
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
async fn step(
    db: &mut OwnConnection,
    bound: Duration,
    batch: i64,
    relay: &Relay,
) -> sqlx::Result<Option<Duration>> {
    let work = async |db: &mut PgConnection| match sweep(db, batch, relay).await? {
        0 => until_next_deadline(db).await.map(Some),
        _ => Ok(None),
    };
    db.round(bound, work).await
}

/// Cancels one batch of due orders; returns how many.
async fn sweep(db: &mut PgConnection, batch: i64, relay: &Relay) -> sqlx::Result<usize> {
    let mut tx = db.begin().await?;
    let due = store::lock_due_orders(&mut tx, batch).await?;
    if due.is_empty() {
        tx.rollback().await?;
        return Ok(0);
    }
    let orders: Vec<OrderId> = due.iter().map(|(order, _)| *order).collect();
    settle(&mut tx, &orders, Event::Expire, None).await?;
    tx.commit().await?;
    relay.wake();
    count_transition(Status::Cancelled, orders.len() as u64);
    for (_, late) in &due {
        LATENESS.observe(late.max(0.0));
    }
    tracing::info!(orders = orders.len(), "unpaid orders cancelled");
    Ok(orders.len())
}

async fn until_next_deadline(db: &mut PgConnection) -> sqlx::Result<Duration> {
    let seconds = store::seconds_to_next_deadline(db).await?;
    let jitter = SHORTEST_SLEEP.mul_f64(rand::random::<f64>());
    let until = seconds.map_or(LONGEST_SLEEP, |seconds| {
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    });
    Ok(until.clamp(SHORTEST_SLEEP + jitter, LONGEST_SLEEP))
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

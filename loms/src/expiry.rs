//! Cancels what was not paid in time. Time is the database's; any number of replicas sweep, and none waits for another.

use std::{sync::LazyLock, time::Duration};

use platform::{grpc::registered, tasks::Tasks};
use prometheus::{Histogram, HistogramOpts};
use sqlx::PgPool;

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

/// Starts the sweeper, which has a connection of its own.
pub(crate) fn start(pool: PgPool, batch: i64, relay: Relay, tasks: &Tasks) {
    let stopping = tasks.stopping();
    tasks.worker("expiry", async move {
        loop {
            let pause = match sweep(&pool, batch, &relay).await {
                Ok(swept) if swept > 0 && !stopping.is_cancelled() => continue,
                Ok(_) => until_next_deadline(&pool).await.unwrap_or(LONGEST_SLEEP),
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

/// Cancels one batch of due orders; returns how many.
async fn sweep(pool: &PgPool, batch: i64, relay: &Relay) -> sqlx::Result<usize> {
    let mut tx = pool.begin().await?;
    let due = store::lock_due_orders(&mut tx, batch).await?;
    if due.is_empty() {
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

async fn until_next_deadline(pool: &PgPool) -> sqlx::Result<Duration> {
    let mut db = pool.acquire().await?;
    let seconds = store::seconds_to_next_deadline(&mut db).await?;
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

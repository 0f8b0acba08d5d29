//! Sweeps idempotency keys when their time is over. A key is a promise for days, not for ever: without the sweep the table
//! that every order with a key is looked up in would only grow. Any number of replicas sweep, and none waits for another.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use platform::{
    grpc::registered,
    pg::{self, Db, Pool},
    state_log::StateLog,
    tasks::Tasks,
};
use prometheus::IntCounter;

use crate::{config::KeysConfig, store::keys as store};

/// The longest pause after a sweep that failed: its connection is gone, the next sweep makes another.
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// An interval of 0 in the config must not turn the worker into a busy loop.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

static SWEEPS: StateLog = StateLog::new(
    "sweep of idempotency keys failed",
    "idempotency keys are swept again",
);

/// Starts the sweeper, which has a connection of its own; so that callers cannot stop it.
pub(crate) fn start(db: Pool, config: KeysConfig, tasks: &Tasks) {
    let stopping = tasks.stopping();
    tasks.worker("keys", async move {
        loop {
            let began = Instant::now();
            let swept = step(&db, &config).await;
            let pause = match swept.inspect(|_| SWEEPS.works()) {
                // as long as the batch took: orders have the other half of the disk's time
                Ok(true) => began.elapsed(),
                Ok(false) => asleep(config.sweep_every),
                Err(error) => {
                    SWEEPS.failed(&error);
                    asleep(config.sweep_every.min(LONGEST_RETRY))
                }
            };
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
}

/// Sweeps one batch. `true`: more may be due.
async fn step(db: &Pool, config: &KeysConfig) -> pg::Result<bool> {
    let (keep, batch) = (config.keep, config.sweep_batch);
    let work = async |db: &mut Db| store::sweep_keys(db, keep, batch).await;
    let swept = db.repeatable(work).await?;
    if swept > 0 {
        SWEPT.inc_by(swept);
        tracing::debug!(keys = swept, "old idempotency keys swept");
    }
    Ok(swept > 0 && swept >= batch.cast_unsigned())
}

/// Between half and all of `every`: replicas should not sweep at the same moments.
fn asleep(every: Duration) -> Duration {
    every
        .max(SHORTEST_PAUSE)
        .mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

static SWEPT: LazyLock<IntCounter> = LazyLock::new(|| {
    registered(IntCounter::new(
        "loms_idempotency_keys_swept_total",
        "Idempotency keys deleted because their time was over.",
    ))
});

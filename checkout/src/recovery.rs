//! The worker behind purchases: finishes what calls left open, and sweeps what nobody will ask for again. Any number of
//! replicas may run it.

use std::{future::Future, pin::pin, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use platform::pg::{Db, Pool};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    config::PurchasesConfig,
    error::Error,
    metrics::METRICS,
    purchases::{Driver, Purchases},
    store,
};

/// A poll interval of 0 in the config must not turn the worker into a busy loop.
const LEAST_POLL: Duration = Duration::from_millis(10);
/// Rows of one sweep: their locks are held for milliseconds.
const SWEEP_ROWS: i64 = 500;

/// The worker.
pub struct Recovery {
    pool: Pool,
    purchases: Purchases,
    config: PurchasesConfig,
}

impl Recovery {
    /// `pool` and the pool of `purchases` are the worker's own, so that callers cannot starve it.
    pub fn new(pool: Pool, purchases: Purchases, config: PurchasesConfig) -> Self {
        Self {
            pool,
            purchases,
            config,
        }
    }

    /// Runs until `stopping`, then finishes what it has begun; deadlines bound that.
    ///
    /// # Errors
    /// None: what fails is tried again.
    pub async fn run(self, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut sweep_at = Instant::now();
        let mut finishing = FuturesUnordered::new();
        while !stopping.is_cancelled() {
            let claim = self.claim(finishing.len());
            match beside(&mut finishing, claim).await {
                Ok(due) => finishing.extend(due.into_iter().map(|id| self.finish(id))),
                Err(error) => error.log(),
            }
            if Instant::now() >= sweep_at {
                sweep_at = Instant::now() + self.config.sweep_every;
                if let Err(error) = beside(&mut finishing, self.sweep()).await {
                    error.log();
                }
            }
            tokio::select! {
                biased;
                () = stopping.cancelled() => {}
                Some(()) = finishing.next() => {}
                () = tokio::time::sleep(self.pause()) => {}
            }
        }
        while finishing.next().await.is_some() {}
        Ok(())
    }

    /// Between half and all of the poll interval: replicas should not look at the same moments.
    fn pause(&self) -> Duration {
        let poll = self.config.poll.max(LEAST_POLL);
        poll.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }

    /// Takes over what is due, as far as there is room beside the `running` ones.
    async fn claim(&self, running: usize) -> Result<Vec<Uuid>, Error> {
        let work = async |db: &mut Db| {
            // a BEGIN replaces a connection that broke while it rested
            let mut tx = db.begin().await?;
            METRICS.backlog(&store::recovery::measure_backlog(&mut tx).await?);
            let room = usize::from(self.config.at_once.max(1)).saturating_sub(running);
            let mut claimed = vec![];
            if room > 0 {
                let limit = i64::try_from(room).unwrap_or(1);
                let after = self.config.resume_after;
                claimed = store::recovery::claim_due(&mut tx, limit, after).await?;
            }
            tx.commit().await?;
            Ok(claimed)
        };
        self.pool.with_connection(work).await
    }

    /// A trace of its own: the call that began the purchase has ended long ago.
    #[tracing::instrument(skip(self), fields(purchase.id = %id))]
    async fn finish(&self, id: Uuid) {
        let driver = Driver::worker(self.config.resume_after);
        match self.purchases.finish(id, &driver).await {
            Ok(outcome) => {
                tracing::info!(purchase.id = %id, outcome = outcome.name(), "purchase finished by the worker");
            }
            Err(error) => error.log(),
        }
    }

    async fn sweep(&self) -> Result<(), Error> {
        loop {
            let step = async |db: &mut Db| {
                let keep = self.config.keep;
                store::recovery::sweep_closed(db, keep, SWEEP_ROWS).await
            };
            let swept = self.pool.repeatable(step).await?;
            if swept < SWEEP_ROWS.unsigned_abs() {
                return Ok(());
            }
        }
    }
}

/// Does `work` while what is being finished goes on. A finish that nobody polls would keep its connection and the cart's
/// lock, and `work` may need just these.
async fn beside<T>(
    finishing: &mut FuturesUnordered<impl Future<Output = ()>>,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            Some(()) = finishing.next() => {}
        }
    }
}

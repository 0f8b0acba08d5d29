//! The audit as a metric: every few minutes a small random sample of SKUs and orders is recounted, so that drift is noticed
//! without anybody asking. The whole recount is `loms audit`: its snapshot lasts as long as it reads, and keeps every outbox
//! row that was deleted meanwhile from being cleaned away, which would slow the relay down.

use std::{sync::LazyLock, time::Duration};

use platform::{
    grpc::registered,
    pg::{self, Db, Pool},
    tasks::Tasks,
};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts};

use crate::{config::AuditConfig, store::audit as store};

/// Differences that are written to the log; the metric has their number.
const LOGGED: usize = 20;

/// Starts the auditor, unless it is turned off.
pub(crate) fn start(pool: Pool, config: AuditConfig, tasks: &Tasks) {
    LazyLock::force(&METRICS);
    if config.every.is_zero() {
        return;
    }
    let stopping = tasks.stopping();
    tasks.worker("audit", async move {
        loop {
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                () = tokio::time::sleep(asleep(config.every)) => {}
            }
            step(&pool, config.sample).await;
        }
    });
}

/// Between half and all of `every`: replicas should not look at the same moments.
fn asleep(every: Duration) -> Duration {
    every.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

async fn step(pool: &Pool, size: usize) {
    match pool
        .with_connection(async |db| recount(db, size).await)
        .await
    {
        Ok(sample) => {
            METRICS.differences.set(sample.differences.len() as i64);
            METRICS
                .checked
                .with_label_values(&["sku"])
                .inc_by(sample.skus);
            METRICS
                .checked
                .with_label_values(&["order"])
                .inc_by(sample.orders);
            for difference in sample.differences.iter().take(LOGGED) {
                tracing::error!(difference = %difference, "audit found a difference");
            }
        }
        Err(error) => {
            METRICS.failed.inc();
            tracing::warn!(error = %error, "sampled audit failed");
        }
    }
}

/// What was looked at, and what did not add up.
struct Sample {
    skus: u64,
    orders: u64,
    differences: Vec<String>,
}

/// One snapshot for the whole sample; `statement_timeout` bounds each look.
async fn recount(db: &mut Db, size: usize) -> pg::Result<Sample> {
    let places: Vec<f64> = (0..size).map(|_| rand::random()).collect();
    let mut tx = db.begin_with(store::BEGIN_SNAPSHOT).await?;
    let skus = store::pick_skus(&mut tx, &places).await?;
    let orders = store::pick_orders(&mut tx, &places).await?;
    let mut differences = store::find_unconserved_stock_of(&mut tx, &skus).await?;
    differences.extend(store::find_wrong_holdings_of(&mut tx, &orders).await?);
    differences.extend(store::find_wrong_statuses_of(&mut tx, &orders).await?);
    tx.rollback().await?;
    Ok(Sample {
        skus: skus.len() as u64,
        orders: orders.len() as u64,
        differences,
    })
}

struct Metrics {
    differences: IntGauge,
    checked: IntCounterVec,
    failed: IntCounter,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let checked = Opts::new(
        "loms_audit_checked_total",
        "SKUs and orders that the sampled audit has recounted.",
    );
    let checked = registered(IntCounterVec::new(checked, &["kind"]));
    for kind in ["sku", "order"] {
        checked.with_label_values(&[kind]);
    }
    Metrics {
        differences: registered(IntGauge::new(
            "loms_audit_differences",
            "Differences that the last sample of the audit found.",
        )),
        checked,
        failed: registered(IntCounter::new(
            "loms_audit_failed_total",
            "Samples of the audit that could not be recounted.",
        )),
    }
});

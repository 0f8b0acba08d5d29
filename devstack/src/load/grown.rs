//! How the cost of every load of LOMS grows, with what is in the tables and with its replicas. The tables are filled once;
//! then the loads run one after the other, on one process, and again on more.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Plan, calls::Prepared, measure::Figures, orders, skus::Skus, target::Target};

/// What is on sale: the SKUs of every distribution below.
pub(super) const STOCKED: Skus = Skus::Hot(1);
const POPULAR: Skus = Skus::Zipf(0.99, 1_000);
/// What only looks is asked for by so many at once, as in the standard table.
const READERS: usize = 32;
/// Long before the end of a load, and longer than an order waits for its payment.
const SHORT_TIMEOUT: &str = "2s";
const LONG_TIMEOUT: &str = "1h";

fn payment_timeout(timeout: &str) -> Value {
    json!({"orders": {"payment_timeout": timeout}})
}

/// Puts all of them on.
pub(super) async fn put(
    plan: &Plan,
    target: &mut Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<()> {
    for replicas in 1..=plan.replicas {
        target.grow(replicas).await?;
        let mut all = Vec::new();
        one_after_the_other(plan, target, &mut all).await?;
        let named = all.into_iter();
        measured.extend(named.map(|(name, value)| (format!("{replicas}_{name}"), value)));
    }
    Ok(())
}

async fn one_after_the_other(
    plan: &Plan,
    target: &mut Target,
    all: &mut Vec<(String, f64)>,
) -> Result<()> {
    let with = |skus: Skus, clients: usize| Plan {
        skus,
        clients,
        ..plan.clone()
    };
    let readers = with(plan.skus.clone(), READERS);
    note(all, "create", &orders::create(plan, target).await?);
    for (name, skus, clients) in [
        ("create_zipf", POPULAR, plan.clients),
        ("create_hot", STOCKED, plan.clients),
        ("create_lone", plan.skus.clone(), 1),
    ] {
        let figures = orders::create(&with(skus, clients), target).await?;
        note(all, name, &figures);
        if clients == 1 {
            all.push((format!("{name}_p50_ms"), figures.p50_ms));
        }
    }
    let new = orders::prepare(plan, target).await?;
    note(all, "pay", &orders::pay(plan, target, &new).await?);
    note(
        all,
        "list_new",
        &orders::list_order(&readers, target, &new).await?,
    );
    if plan.filled > 0 {
        let old = Prepared::filled(plan.filled);
        note(
            all,
            "list_old",
            &orders::list_order(&readers, target, &old).await?,
        );
    }
    note(all, "stocks", &orders::stocks(&readers, target).await?);
    orders::relay(plan, target, all).await?;
    orders::expiry(plan, target, all).await?;
    target.reconfigure(&payment_timeout(SHORT_TIMEOUT)).await?;
    let mixed = orders::mixed(plan, target, all).await.context("mixed")?;
    note(all, "mixed", &mixed);
    target.reconfigure(&payment_timeout(LONG_TIMEOUT)).await
}

fn note(all: &mut Vec<(String, f64)>, name: &str, figures: &Figures) {
    all.push((format!("{name}_per_second"), figures.per_second));
    all.push((format!("{name}_p99_ms"), figures.p99_ms));
    all.push((format!("{name}_refused"), figures.refused as f64));
}

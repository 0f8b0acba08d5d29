//! Loads of LOMS: orders made, payed, whole, swept, and their events carried away.

use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::{SeedableRng as _, rngs::StdRng};

use super::{
    Plan,
    calls::{self, Prepared},
    measure::{self, Figures, Pace},
    target::{Target, until_none},
};

pub(super) async fn prepare(plan: &Plan, target: &Target) -> Result<Prepared> {
    Prepared::make(&plan.shape(), plan.prepared, target.loms()).await
}

pub(super) async fn create(plan: &Plan, target: &Target) -> Result<Figures> {
    create_at(plan.pace(), plan, target).await
}

async fn create_at(pace: Pace, plan: &Plan, target: &Target) -> Result<Figures> {
    let (loms, shape) = (target.loms(), plan.shape());
    let call = move |mut caller: measure::Caller| {
        let (mut client, shape) = (loms(caller.index), shape.clone());
        async move {
            let answer = calls::create(&mut client, &shape, &mut caller).await;
            (caller, Some(answer))
        }
    };
    measure::run(pace, plan.span(), 1, call).await
}

/// How many times the peak is asked for.
const OVERLOAD: f64 = 10.0;
/// Calls that the schedule may have on their way: it does not wait for a service that is slow.
const CROWD: usize = 16_384;

/// The peak in a closed loop, then a schedule of ten times as many.
pub(super) async fn overload(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Figures> {
    let peak = create(plan, target).await?;
    let crowd = Pace::Open {
        rate: peak.per_second * OVERLOAD,
        clients: CROWD,
    };
    let figures = create_at(crowd, plan, target).await?;
    let offered =
        figures.per_second * figures.calls as f64 / (figures.calls - figures.refused) as f64;
    measured.push(("peak_per_second".into(), peak.per_second));
    measured.push(("offered_of_peak".into(), offered / peak.per_second));
    measured.push((
        "goodput_of_peak".into(),
        figures.per_second / peak.per_second,
    ));
    Ok(figures)
}

pub(super) async fn mixed(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Figures> {
    let (loms, shape) = (target.loms(), plan.shape());
    let call = move |mut caller: measure::Caller| {
        let (mut client, shape) = (loms(caller.index), shape.clone());
        async move {
            let answer = calls::whole(&mut client, &shape, &mut caller).await;
            (caller, Some(answer))
        }
    };
    let figures = measure::run(plan.pace(), plan.span(), 1, call).await?;
    if let Some(mut db) = target.database().await? {
        // what other loads have left is due much later
        let unpaid = "SELECT count(*) FROM loms.unpaid_order WHERE payment_deadline < now() + interval '1 minute'";
        let swept = until_none(&mut db, unpaid, Duration::from_secs(60)).await?;
        measured.push((
            "all_expired_s".into(),
            swept.context("orders never expired")?,
        ));
    }
    Ok(figures)
}

/// Batches as large as the callers at once would make them, on the database of a LOMS that idles.
pub(super) async fn ceiling(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<()> {
    let stack = target.stack().context("ceiling needs a stack of its own")?;
    let url = serde_json::json!({"connection_string": stack.database("loms")?});
    let postgres = serde_json::from_value(url)?;
    let (shape, mut random) = (plan.shape(), StdRng::seed_from_u64(1));
    let mut number = 0;
    let draw = || {
        number += 1;
        let items = shape.skus.order(shape.lines, &mut random);
        let items = items.into_iter().map(|item| (item.sku, item.count));
        (number, items.collect(), format!("{}-{number}", shape.run))
    };
    let span = plan.span();
    let rate = loms::ceiling(&postgres, plan.clients, (span.warmup, span.measured), draw);
    measured.push(("orders_per_second".into(), rate.await?));
    Ok(())
}

/// The events that are left when the load ends.
pub(super) async fn drain(target: &Target, measured: &mut Vec<(String, f64)>) -> Result<()> {
    if let Some(mut db) = target.database().await? {
        let waiting = "SELECT count(*) FROM loms.outbox";
        let drained = until_none(&mut db, waiting, Duration::from_secs(60)).await?;
        measured.push((
            "outbox_drained_s".into(),
            drained.context("the outbox never drained")?,
        ));
    }
    Ok(())
}

/// All that was prepared falls due at one moment, and the sweeper works through it while orders are made.
pub(super) async fn expiry(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Figures> {
    prepare(plan, target).await?;
    let mut db = target
        .database()
        .await?
        .context("expiry needs a stack of its own")?;
    let before = create(plan, target).await?;
    sqlx::query("UPDATE loms.unpaid_order SET payment_deadline = clock_timestamp()")
        .execute(&mut db)
        .await?;
    // what is made meanwhile is due in an hour
    let due = "SELECT count(*) FROM loms.unpaid_order WHERE payment_deadline < clock_timestamp()";
    let many: i64 = sqlx::query_scalar("SELECT count(*) FROM loms.unpaid_order")
        .fetch_one(&mut db)
        .await?;
    let (swept, during) = tokio::join!(
        until_none(&mut db, due, Duration::from_secs(120)),
        create(plan, target)
    );
    let (swept, during) = (swept?.context("orders never expired")?, during?);
    measured.push(("swept_orders".into(), many as f64));
    measured.push(("swept_per_second".into(), many as f64 / swept));
    measured.push(("creates_per_second_before".into(), before.per_second));
    measured.push((
        "creates_of_before".into(),
        during.per_second / before.per_second,
    ));
    Ok(during)
}

/// The advisory lock of the relay, `LOMS rel` in ASCII: held here, events gather.
const RELAY_LOCK: i64 = 0x4c4f_4d53_2072_656c;

pub(super) async fn relay(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<()> {
    let mut db = target
        .database()
        .await?
        .context("relay needs a stack of its own")?;
    sqlx::query("SELECT pg_advisory_lock($1)")
        .bind(RELAY_LOCK)
        .execute(&mut db)
        .await?;
    prepare(plan, target).await?;
    let events: i64 = sqlx::query_scalar("SELECT count(*) FROM loms.outbox")
        .fetch_one(&mut db)
        .await?;
    sqlx::query("SELECT pg_advisory_unlock($1)")
        .bind(RELAY_LOCK)
        .execute(&mut db)
        .await?;
    let waiting = "SELECT count(*) FROM loms.outbox";
    let drained = until_none(&mut db, waiting, Duration::from_secs(120)).await?;
    let seconds = drained.context("the outbox never drained")?;
    measured.push(("events".into(), events as f64));
    measured.push(("events_per_second".into(), events as f64 / seconds));
    Ok(())
}

/// OrderPayed of orders made before, each once.
pub(super) async fn pay(plan: &Plan, target: &Target, prepared: &Prepared) -> Result<Figures> {
    let (loms, prepared) = (target.loms(), prepared.clone());
    let call = move |caller: measure::Caller| {
        let (mut client, prepared) = (loms(caller.index), prepared.clone());
        async move { (caller, calls::pay(&mut client, &prepared).await) }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

/// Stocks of any SKU.
pub(super) async fn stocks(plan: &Plan, target: &Target) -> Result<Figures> {
    let (loms, skus) = (target.loms(), plan.skus.clone());
    let call = move |mut caller: measure::Caller| {
        let (mut client, skus) = (loms(caller.index), skus.clone());
        async move {
            let answer = calls::stocks(&mut client, &skus, &mut caller).await;
            (caller, Some(answer))
        }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

/// ListOrder of any order made before.
pub(super) async fn list_order(
    plan: &Plan,
    target: &Target,
    prepared: &Prepared,
) -> Result<Figures> {
    let (loms, prepared) = (target.loms(), prepared.clone());
    let call = move |mut caller: measure::Caller| {
        let (mut client, prepared) = (loms(caller.index), prepared.clone());
        async move {
            let answer = calls::list_order(&mut client, &prepared, &mut caller).await;
            (caller, answer)
        }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

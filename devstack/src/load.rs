//! `devstack load`: how fast the system is, with everything on that it promises: durability, TLS, idempotency keys, the
//! relay and the broker. A fresh database, a warm-up that is left out, `loms audit` after it.

mod calls;
mod measure;
mod report;
mod skus;
mod target;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Subcommand};
use rand::{SeedableRng as _, rngs::StdRng};

use crate::{binaries::Binaries, signals::Stop};

use calls::{Prepared, Shape};
use measure::{Figures, Pace, Span};
use report::{Machine, Report};
use skus::Skus;
use target::{Address, Target, until_none};

/// What is put on the system.
#[derive(Subcommand, Clone)]
pub enum What {
    /// CreateOrder
    Create(Plan),
    /// OrderPayed of orders made before
    Pay(Plan),
    /// Whole orders: made, then eight of ten payed, one cancelled, one left to expire
    Mixed(Plan),
    /// Stocks
    Stocks(Plan),
    /// ListOrder of orders made before
    ListOrder(Plan),
    /// Orders that fall due at once are swept while others are made
    Expiry(Plan),
    /// Events that have gathered are carried to the broker
    Relay(Plan),
    /// The writes of create and of the relay by LOMS' own code, on the database alone: what create can be at most
    Ceiling(Plan),
}

impl What {
    fn name(&self) -> &'static str {
        match self {
            What::Create(_) => "create",
            What::Pay(_) => "pay",
            What::Mixed(_) => "mixed",
            What::Stocks(_) => "stocks",
            What::ListOrder(_) => "list-order",
            What::Expiry(_) => "expiry",
            What::Relay(_) => "relay",
            What::Ceiling(_) => "ceiling",
        }
    }

    /// How it is done.
    pub fn plan(&self) -> &Plan {
        match self {
            What::Create(plan)
            | What::Pay(plan)
            | What::Mixed(plan)
            | What::Stocks(plan)
            | What::ListOrder(plan)
            | What::Expiry(plan)
            | What::Relay(plan)
            | What::Ceiling(plan) => plan,
        }
    }
}

/// How it is done.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Callers at once, each with its next call when it has an answer
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Calls a second on a schedule instead; an answer counts from when its call was due
    #[arg(long)]
    rate: Option<f64>,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Seconds before that
    #[arg(long, default_value_t = 3)]
    warmup: u64,
    /// Lines of an order
    #[arg(long, default_value_t = 3)]
    lines: usize,
    /// uniform:N, zipf:EXPONENT:N, or hot:N (one of N in every order)
    #[arg(long, default_value = "uniform:1000")]
    skus: Skus,
    /// A hundred units a warehouse instead of more than can be sold
    #[arg(long)]
    scarce: bool,
    /// Without idempotency keys
    #[arg(long)]
    no_keys: bool,
    /// Orders made before pay, list-order, expiry and relay
    #[arg(long, default_value_t = 100_000)]
    prepared: usize,
    /// Write the report here as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// A server that runs, host:port, instead of a stack of its own
    #[arg(long)]
    pub addr: Option<String>,
    /// What verifies its certificate; plaintext without
    #[arg(long, requires = "addr")]
    ca: Option<PathBuf>,
    /// Start the services as they are, without `cargo build`
    #[arg(long)]
    pub no_build: bool,
}

impl Plan {
    fn pace(&self) -> Pace {
        match self.rate {
            Some(rate) => Pace::Open {
                rate,
                // what is admitted at once anyway; a call beyond waits, and its wait counts
                clients: self.clients.max(512),
            },
            None => Pace::Closed {
                clients: self.clients,
            },
        }
    }

    fn span(&self) -> Span {
        Span {
            warmup: Duration::from_secs(self.warmup),
            measured: Duration::from_secs(self.seconds),
        }
    }

    fn shape(&self) -> Shape {
        Shape {
            skus: self.skus.clone(),
            lines: self.lines,
            keys: !self.no_keys,
            run: uuid::Uuid::new_v4().simple().to_string()[..8].to_owned(),
        }
    }
}

/// Runs it, prints the report, and fails if the audit does.
pub async fn run(what: &What, binaries: Option<Binaries>) -> Result<()> {
    let plan = what.plan();
    let mut stop = Stop::listen()?;
    let report = stop.interrupts(measured(what, binaries)).await?;
    print!("{}", report.text());
    if let Some(file) = &plan.json {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, json + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    ensure!(
        report.audit_clean != Some(false),
        "the audit found differences"
    );
    Ok(())
}

/// One run on a target of its own, or on one that runs.
async fn measured(what: &What, binaries: Option<Binaries>) -> Result<Report> {
    let plan = what.plan();
    let target = match (&plan.addr, binaries) {
        (Some(grpc), _) => Target::at(&Address {
            grpc: grpc.clone(),
            ca: plan.ca.clone(),
        })?,
        (None, Some(binaries)) => Target::own(binaries, payment_timeout(what)).await?,
        (None, None) => anyhow::bail!("neither a server nor the services' binaries"),
    };
    let outcome = on_target(what, &target).await;
    let stopped = target.stop().await;
    let report = outcome?;
    stopped?;
    Ok(report)
}

/// Short enough for mixed orders to expire while it runs, long enough never to in the others.
fn payment_timeout(what: &What) -> &'static str {
    if matches!(what, What::Mixed(_)) {
        "2s"
    } else {
        "1h"
    }
}

async fn on_target(what: &What, target: &Target) -> Result<Report> {
    let plan = what.plan();
    target.stock(&plan.skus, plan.scarce).await?;
    let mut measured = Vec::new();
    let figures = put(what, target, &mut measured).await?;
    drain(target, &mut measured).await?;
    let audit = target.audit().await?;
    Ok(Report {
        load: what.name().to_owned(),
        pace: match plan.rate {
            Some(rate) => format!("{rate} a second"),
            None => format!("{} callers", plan.clients),
        },
        orders: format!("{} lines, {}", plan.lines, plan.skus),
        seconds: plan.seconds,
        figures,
        measured,
        peak_memory_mib: target.peak_memory(),
        audit_clean: audit.as_ref().map(|(clean, _)| *clean),
        audit: audit.map(|(_, line)| line),
        machine: Machine::of(target).await?,
    })
}

/// Puts the load on; what it measures beside its calls goes into `measured`.
async fn put(
    what: &What,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Option<Figures>> {
    let plan = what.plan();
    Ok(match what {
        What::Create(_) => Some(create(plan, target).await?),
        What::Mixed(_) => Some(mixed(plan, target, measured).await?),
        What::Pay(_) => {
            let prepared = prepare(plan, target).await?;
            let loms = target.loms();
            let call = move |caller: measure::Caller| {
                let (mut client, prepared) = (loms(caller.index), prepared.clone());
                async move { (caller, calls::pay(&mut client, &prepared).await) }
            };
            Some(measure::run(plan.pace(), plan.span(), 1, call).await?)
        }
        What::Stocks(_) => {
            let (loms, skus) = (target.loms(), plan.skus.clone());
            let call = move |mut caller: measure::Caller| {
                let (mut client, skus) = (loms(caller.index), skus.clone());
                async move {
                    let answer = calls::stocks(&mut client, &skus, &mut caller).await;
                    (caller, Some(answer))
                }
            };
            Some(measure::run(plan.pace(), plan.span(), 1, call).await?)
        }
        What::ListOrder(_) => {
            let prepared = prepare(plan, target).await?;
            let loms = target.loms();
            let call = move |mut caller: measure::Caller| {
                let (mut client, prepared) = (loms(caller.index), prepared.clone());
                async move {
                    let answer = calls::list_order(&mut client, &prepared, &mut caller).await;
                    (caller, answer)
                }
            };
            Some(measure::run(plan.pace(), plan.span(), 1, call).await?)
        }
        What::Expiry(_) => Some(expiry(plan, target, measured).await?),
        What::Relay(_) => {
            relay(plan, target, measured).await?;
            None
        }
        What::Ceiling(_) => {
            ceiling(plan, target, measured).await?;
            None
        }
    })
}

async fn prepare(plan: &Plan, target: &Target) -> Result<Prepared> {
    Prepared::make(&plan.shape(), plan.prepared, target.loms()).await
}

async fn create(plan: &Plan, target: &Target) -> Result<Figures> {
    let (loms, shape) = (target.loms(), plan.shape());
    let call = move |mut caller: measure::Caller| {
        let (mut client, shape) = (loms(caller.index), shape.clone());
        async move {
            let answer = calls::create(&mut client, &shape, &mut caller).await;
            (caller, Some(answer))
        }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

async fn mixed(plan: &Plan, target: &Target, measured: &mut Vec<(String, f64)>) -> Result<Figures> {
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
        let unpaid = "SELECT count(*) FROM loms.unpaid_order";
        let swept = until_none(&mut db, unpaid, Duration::from_secs(60)).await?;
        measured.push((
            "all_expired_s".into(),
            swept.context("orders never expired")?,
        ));
    }
    Ok(figures)
}

/// Batches as large as the callers at once would make them, on the database of a LOMS that idles.
async fn ceiling(plan: &Plan, target: &Target, measured: &mut Vec<(String, f64)>) -> Result<()> {
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
async fn drain(target: &Target, measured: &mut Vec<(String, f64)>) -> Result<()> {
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
async fn expiry(
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
    Ok(during)
}

/// The advisory lock of the relay, `LOMS rel` in ASCII: held here, events gather.
const RELAY_LOCK: i64 = 0x4c4f_4d53_2072_656c;

async fn relay(plan: &Plan, target: &Target, measured: &mut Vec<(String, f64)>) -> Result<()> {
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

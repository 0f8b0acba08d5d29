//! `devstack load`: how fast the system is, with everything on that it promises: durability, TLS, idempotency keys, the
//! relay and the broker. A fresh database, a warm-up that is left out, `loms audit` after it.

mod calls;
mod carts;
mod events;
mod fill;
mod grown;
mod measure;
mod orders;
mod paths;
mod plans;
mod report;
mod skus;
mod statements;
mod statistics;
mod target;
mod what;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    binaries::Binaries, failure::after_cleanup, service::merge, signals::Stop, stack::Options,
};

use measure::Figures;
pub(crate) use report::Report;
use report::{Costs, Machine};
use target::{Address, Target};
use what::Setting;
pub use what::{Plan, What};

/// Runs it, prints the report, and fails if the audit does.
pub async fn run(what: &What, binaries: Option<Binaries>) -> Result<()> {
    let mut stop = Stop::listen()?;
    let said = |report| say(what, &report);
    stop.interrupts(measured(what, binaries, said)).await
}

fn say(what: &What, report: &Report) -> Result<()> {
    print!("{}", report.text());
    let plan = what.plan();
    if let Some(file) = &plan.json {
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(file, json + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    if matches!(what, What::Overload(_)) {
        report.expect_goodput()?;
    }
    report.expect_clean()
}

/// One run on a target of its own, or on one that runs. `say` has the report before the target is stopped.
pub(crate) async fn measured<T>(
    what: &What,
    binaries: Option<Binaries>,
    say: impl FnOnce(Report) -> Result<T>,
) -> Result<T> {
    let plan = what.plan();
    let mut target = match (&plan.addr, binaries) {
        (Some(grpc), _) => Target::at(&Address {
            grpc: grpc.clone(),
            ca: plan.ca.clone(),
        })?,
        (None, Some(binaries)) => {
            let options = Options {
                payment_timeout: payment_timeout(what),
                services: what.services(),
                settings: settings(what),
                ..Options::new(binaries)
            };
            // the first figures are of one process
            let replicas = match what {
                What::Grown(_) => 1,
                _ => plan.replicas,
            };
            Target::own(options, replicas).await?
        }
        (None, None) => anyhow::bail!("neither a server nor the services' binaries"),
    };
    let outcome = on_target(what, &mut target).await;
    after_cleanup(outcome.and_then(say), target.stop().await)
}

/// Short enough for mixed orders to expire while it runs, long enough never to in the others.
fn payment_timeout(what: &What) -> &'static str {
    if matches!(what, What::Mixed(_)) {
        "2s"
    } else {
        "1h"
    }
}

fn settings(what: &What) -> Value {
    let mut all = own_settings(what);
    let called = what.services()[0];
    for Setting(setting) in &what.plan().settings {
        merge(&mut all, &json!({ called: setting }));
    }
    all
}

/// So small in the overload that its callers, who share the machine, can ask for ten times what it does.
fn own_settings(what: &What) -> Value {
    match what {
        What::Overload(_) => json!({"loms": {
            "orders": {"batch_orders": 1, "queue": 32},
            "limits": {"in_flight": 64},
        }}),
        _ => json!({}),
    }
}

async fn on_target(what: &What, target: &mut Target) -> Result<Report> {
    let plan = what.plan();
    let stocked = match what {
        What::Grown(_) => &grown::STOCKED,
        _ => &plan.skus,
    };
    target.stock(stocked, plan.scarce).await?;
    if let (true, Some(mut db)) = (plan.filled > 0, target.admin().await?) {
        fill::fill(&mut db, plan.filled, &plan.skus).await?;
    }
    let mut measured = Vec::new();
    let mut watched = None;
    let (figures, mut costs) = match what {
        What::Plans(plan) => {
            watched = Some(paths::walk(plan, target).await?);
            (None, Costs::Unknown)
        }
        // the plans are what grows; the tables are filled once for both
        What::Grown(plan) if plan.statements => {
            grown::put(plan, target, &mut measured).await?;
            watched = Some(paths::walk(plan, target).await?);
            (None, Costs::Unknown)
        }
        _ if plan.statements => {
            let db = target.admin().await?;
            let mut db = db.context("--statements needs a LOMS of its own")?;
            statistics::start(&mut db).await?;
            let figures = put(what, target, &mut measured).await?;
            (figures, Costs::Load(statistics::finish(&mut db).await?))
        }
        _ => (put(what, target, &mut measured).await?, Costs::Unknown),
    };
    orders::drain(target, &mut measured).await?;
    let audit = target.audit().await?;
    // the audit has statements too
    if let Some(watched) = watched {
        costs = Costs::Plans(watched.finish().await?);
    }
    Ok(Report {
        load: what.name().to_owned(),
        pace: match plan.rate {
            Some(rate) => format!("{rate} a second"),
            None => format!("{} callers", plan.clients),
        },
        orders: what.subject(),
        seconds: plan.seconds,
        figures,
        measured,
        costs,
        service: what.services()[0],
        peak_memory_mib: target.peak_memory(),
        audit_clean: audit.as_ref().map(|(clean, _)| *clean),
        audit: audit.map(|(_, line)| line),
        machine: Machine::of(target).await?,
    })
}

/// Puts the load on; what it measures beside its calls goes into `measured`.
async fn put(
    what: &What,
    target: &mut Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Option<Figures>> {
    let plan = what.plan();
    Ok(Some(match what {
        What::Create(_) => orders::create(plan, target).await?,
        What::Mixed(_) => orders::mixed(plan, target, measured).await?,
        What::Pay(_) => {
            let prepared = orders::prepare(plan, target).await?;
            orders::pay(plan, target, &prepared).await?
        }
        What::Stocks(_) => orders::stocks(plan, target).await?,
        What::ListOrder(_) => {
            let prepared = orders::prepare(plan, target).await?;
            orders::list_order(plan, target, &prepared).await?
        }
        What::Expiry(_) => orders::expiry(plan, target, measured).await?,
        What::Overload(_) => orders::overload(plan, target, measured).await?,
        What::ListCart(_) => carts::list(plan, target, measured).await?,
        What::Events(_) => events::save_and_show(plan, target, measured).await?,
        What::Grown(_) => {
            grown::put(plan, target, measured).await?;
            return Ok(None);
        }
        // it is told by its statements alone
        What::Plans(_) => return Ok(None),
        What::Relay(_) => {
            orders::relay(plan, target, measured).await?;
            return Ok(None);
        }
        What::Ceiling(_) => {
            orders::ceiling(plan, target, measured).await?;
            return Ok(None);
        }
    }))
}

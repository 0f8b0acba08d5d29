//! `devstack load`: how fast the system is, with everything on that it promises: durability, TLS, idempotency keys, the
//! relay and the broker. A fresh database, a warm-up that is left out, `loms audit` after it.

mod calls;
mod carts;
mod events;
mod fill;
mod measure;
mod orders;
mod report;
mod skus;
mod target;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{binaries::Binaries, signals::Stop, stack::Options};

use calls::Shape;
use measure::{Figures, Pace, Span};
use report::Machine;
pub(crate) use report::Report;
use skus::Skus;
use target::{Address, Target};

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
    /// CreateOrder at ten times what a LOMS that is kept small can do: how much of that it still does
    Overload(Plan),
    /// Create, pay, ListOrder and Stocks one after the other, with `--filled` orders in the tables
    Grown(Plan),
    /// Events that have gathered are carried to the broker
    Relay(Plan),
    /// ListCart of carts filled before, prices cached
    ListCart(Plan),
    /// Events that have gathered are saved, then histories are shown: a million messages of ten thousand users
    Events(Plan),
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
            What::Overload(_) => "overload",
            What::Grown(_) => "grown",
            What::Relay(_) => "relay",
            What::ListCart(_) => "list-cart",
            What::Events(_) => "events",
            What::Ceiling(_) => "ceiling",
        }
    }

    /// What runs: the service that is called first.
    fn services(&self) -> &'static [&'static str] {
        match self {
            What::ListCart(_) => &["checkout", "loms"],
            What::Events(_) => &["notifications"],
            _ => &["loms"],
        }
    }

    /// What its calls are about.
    fn subject(&self) -> String {
        let plan = self.plan();
        match self {
            What::Events(_) => format!("{} events", plan.prepared),
            What::ListCart(_) => format!("{} lines", plan.lines),
            _ if plan.filled > 0 => format!(
                "{} lines, {}, {} orders in the tables",
                plan.lines, plan.skus, plan.filled
            ),
            _ if plan.replicas > 1 => format!(
                "{} lines, {}, {} replicas",
                plan.lines, plan.skus, plan.replicas
            ),
            _ => format!("{} lines, {}", plan.lines, plan.skus),
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
            | What::Overload(plan)
            | What::Grown(plan)
            | What::Relay(plan)
            | What::ListCart(plan)
            | What::Events(plan)
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
    /// Payed orders in the tables before the load, written by SQL
    #[arg(long, default_value_t = 0)]
    filled: i64,
    /// Processes of LOMS on the one database, each with its share of the callers
    #[arg(long, default_value_t = 1)]
    replicas: usize,
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
    if matches!(what, What::Overload(_)) {
        report.expect_goodput()?;
    }
    report.expect_clean()
}

/// One run on a target of its own, or on one that runs.
pub(crate) async fn measured(what: &What, binaries: Option<Binaries>) -> Result<Report> {
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
            Target::own(&options, plan.replicas).await?
        }
        (None, None) => anyhow::bail!("neither a server nor the services' binaries"),
    };
    let outcome = on_target(what, &mut target).await;
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

/// So small in the overload that its callers, who share the machine, can ask for ten times what it does.
fn settings(what: &What) -> Value {
    match what {
        What::Overload(_) => json!({"loms": {
            "orders": {"batch_orders": 1, "queue": 32},
            "limits": {"in_flight": 64},
        }}),
        _ => Value::Null,
    }
}

async fn on_target(what: &What, target: &mut Target) -> Result<Report> {
    let plan = what.plan();
    target.stock(&plan.skus, plan.scarce).await?;
    if let (true, Some(mut db)) = (plan.filled > 0, target.database().await?) {
        fill::fill(&mut db, plan.filled, &plan.skus).await?;
    }
    let mut measured = Vec::new();
    let figures = put(what, target, &mut measured).await?;
    orders::drain(target, &mut measured).await?;
    let audit = target.audit().await?;
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
        What::Pay(_) => orders::pay(plan, target).await?,
        What::Stocks(_) => orders::stocks(plan, target).await?,
        What::ListOrder(_) => orders::list_order(plan, target).await?,
        What::Expiry(_) => orders::expiry(plan, target, measured).await?,
        What::Overload(_) => orders::overload(plan, target, measured).await?,
        What::ListCart(_) => carts::list(plan, target, measured).await?,
        What::Events(_) => events::save_and_show(plan, target, measured).await?,
        What::Grown(_) => {
            orders::grown(plan, target, measured).await?;
            return Ok(None);
        }
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

//! Chaos: load on a stack of its own, services killed, the broker taken away and the database restarted as by a crash while
//! callers write down what they are told; then rest, and a recount of the raw tables and the log against what was told.
//!
//! `load` starts the callers (`shoppers`, `buyers`), who share a ledger (`calls`, `facts`). `faults` is what happens to
//! them. `settle` waits for rest, `snapshot` and `log` read what is there, `recount` judges it, `report` says so.

mod buyers;
mod calls;
mod facts;
mod faults;
mod load;
mod log;
mod recount;
mod report;
mod settle;
mod shoppers;
mod snapshot;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{SeedableRng as _, rngs::StdRng};

pub use self::{
    calls::{Ledger, Tally},
    faults::Counts,
    load::Load,
    recount::{Finding, Findings, Kind},
    report::{Audit, Report},
};
use self::{faults::Schedule, recount::recount as judge, report::Material, snapshot::Snapshot};
use crate::{
    binaries::Binaries,
    broker,
    failure::after_cleanup,
    kafka::Tools,
    postgres,
    signals::Stop,
    stack::{Options, Stack},
};

/// In place of 10 minutes: some orders are left to it.
pub const PAYMENT_TIMEOUT: &str = "5s";
/// For everything to come to rest: the payment timeout, a consumer that joins anew, purchases that wait for their worker.
const SETTLE_BOUND: Duration = Duration::from_secs(90);
/// After the last fault, for every service to be seen at work again; far over the bound that is judged.
const BACK_BOUND: Duration = Duration::from_secs(20);

/// What a person asks for.
#[derive(Debug)]
pub struct Order {
    pub seconds: u64,
    pub seed: u64,
    /// Where the report goes besides stdout.
    pub json: Option<PathBuf>,
}

/// What is done to a stack.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    /// The faults are drawn over this time, and the load lasts at least as long.
    pub over: Duration,
    pub counts: Counts,
    pub load: Load,
}

impl Plan {
    /// As many faults as a run of so many seconds has room for.
    fn of(order: &Order) -> Plan {
        let seconds = usize::try_from(order.seconds).unwrap_or(usize::MAX);
        Plan {
            seed: order.seed,
            over: Duration::from_secs(order.seconds),
            counts: Counts {
                kills: seconds.div_ceil(4),
                outages: seconds.div_ceil(40),
                restarts: seconds.div_ceil(20),
            },
            load: Load::default(),
        }
    }
}

/// Runs chaos on a stack of its own; the last line is the figures. Exit code 1 if anything is not as it must be.
pub async fn run(order: &Order, binaries: Binaries) -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let options = Options {
        payment_timeout: PAYMENT_TIMEOUT,
        postgres: postgres::Source::Own,
        broker: stop.interrupts(broker()).await?,
        ..Options::new(binaries)
    };
    println!("starting; the seed is {}", order.seed);
    let mut stack = stop.interrupts(Stack::start(&options)).await?;
    let say = |line: &str| println!("{line}");
    let disturbed = stop
        .interrupts(disturb(&mut stack, &Plan::of(order), say))
        .await;
    if disturbed.is_err() {
        eprintln!("{}", stack.logs());
    }
    let said = disturbed.and_then(|(report, _)| say_report(order, &report));
    after_cleanup(said, stop.impatient(stack.stop()).await)
}

fn say_report(order: &Order, report: &Report) -> Result<ExitCode> {
    if let Some(file) = &order.json {
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(file, json + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    for line in report.lines() {
        println!("{line}");
    }
    println!("{}", report.line());
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Apache Kafka where it can be had: the mock cluster forgets the oldest records of a long run.
async fn broker() -> Result<broker::Source> {
    Ok(match Tools::find().await {
        Ok(tools) => broker::Source::Own(tools),
        Err(error) => {
            println!("using the mock cluster instead of Apache Kafka: {error}");
            broker::Source::Mock
        }
    })
}

/// Puts load on a fresh stack, does what the plan says, lets it come to rest and recounts. Says each fault as it happens.
/// Answers the report and what callers were told.
pub async fn disturb(
    stack: &mut Stack,
    plan: &Plan,
    say: impl Fn(&str),
) -> Result<(Report, Arc<Ledger>)> {
    let began = Instant::now();
    let mut random = StdRng::seed_from_u64(plan.seed);
    let schedule = Schedule::draw(&mut random, plan.over, plan.counts);
    let load = load::start(stack, plan.load, plan.seed).await?;
    let done = faults::carry_out(stack, &schedule, &load.ledger, &say).await?;
    let until = began + plan.over;
    tokio::time::sleep_until(until.into()).await;
    wait_until_back(&load.ledger).await;
    let seconds = began.elapsed().as_secs_f64();
    let ledger = load.finish().await?;

    let resting = Instant::now();
    say("no more load: waiting for rest");
    stack.wait_ready().await?;
    let under_way = settle::settle(stack, SETTLE_BOUND).await?;
    let settled_in_s = resting.elapsed().as_secs_f64();
    let asked_again = settle::ask_again(stack, &ledger).await?;
    let snapshot = Snapshot::read(stack).await?;
    let mut findings = judge(&snapshot, &ledger.facts());
    for what in under_way {
        findings.add(Kind::Wrong, format!("never came to rest, {what}"));
    }
    let audit = audit(stack, &mut findings).await?;
    let report = Report::new(Material {
        seed: plan.seed,
        seconds,
        broker: stack.broker().description().to_owned(),
        done,
        facts: &ledger.facts(),
        tally: &ledger.tally(),
        snapshot: &snapshot,
        findings,
        audit,
        asked_again,
        settled_in_s,
    });
    Ok((report, ledger))
}

async fn wait_until_back(ledger: &Ledger) {
    let by = Instant::now() + BACK_BOUND;
    while !ledger.is_back() && Instant::now() < by {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Recounts a stack at rest against what callers were told.
pub async fn recount(stack: &Stack, ledger: &Ledger) -> Result<Findings> {
    let snapshot = Snapshot::read(stack).await?;
    Ok(judge(&snapshot, &ledger.facts()))
}

async fn audit(stack: &Stack, findings: &mut Findings) -> Result<Audit> {
    let audit = stack.command("loms", &["audit"]).await?;
    if audit.status.success() {
        return Ok(Audit::Clean);
    }
    findings.add(Kind::Wrong, format!("loms audit: {}", audit.stdout));
    Ok(Audit::NotClean)
}

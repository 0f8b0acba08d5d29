//! Load and faults on real processes, small enough for every run of the tests: what must hold after a crash, and that the
//! recount notices when it does not.

use std::{str::FromStr, time::Duration};

use devstack::{
    broker,
    chaos::{Counts, Kind, Ledger, Load, PAYMENT_TIMEOUT, Plan, Report, disturb},
    postgres,
    stack::{Options, Stack},
};

use crate::test_stack::binaries;

/// A size from the environment, where a run is to be larger.
pub(crate) fn size<T: FromStr>(variable: &str, default: T) -> T {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number")),
        Err(_) => default,
    }
}

/// `faults` over so many seconds, on the servers that the tests were given except for what is to be restarted.
pub(crate) fn plan(counts: Counts, seconds: u64) -> Plan {
    Plan {
        // another one each time; a report that is not clean begins with it
        seed: size("CHAOS_SEED", u64::from(std::process::id())),
        over: Duration::from_secs(seconds),
        counts,
        load: Load {
            shoppers: 4,
            buyers: 4,
            impatience: 0,
        },
    }
}

/// A stack for the plan, on the servers that the tests were given; its database is its own where it will be restarted.
pub(crate) async fn start(plan: &Plan) -> Stack {
    start_on(plan, broker::Source::Environment).await
}

/// The same on other brokers.
pub(crate) async fn start_on(plan: &Plan, broker: broker::Source) -> Stack {
    let source = match plan.counts.restarts {
        0 => postgres::Source::Environment,
        _ => postgres::Source::Own,
    };
    let options = Options {
        payment_timeout: PAYMENT_TIMEOUT,
        postgres: source,
        broker,
        quiet: true,
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.expect("the stack starts")
}

/// Carries the plan out; nothing may be lost, duplicated or wrong.
pub(crate) async fn carry_out(stack: &mut Stack, plan: &Plan) -> (Report, std::sync::Arc<Ledger>) {
    let disturbed = disturb(stack, plan, |line| eprintln!("{line}")).await;
    let (report, ledger) = disturbed.unwrap_or_else(|error| panic!("{error:#}\n{}", stack.logs()));
    assert!(
        report.is_clean(),
        "{}\n{}\n{}",
        report.lines().join("\n"),
        report.line(),
        stack.logs()
    );
    let found = [Kind::Lost, Kind::Duplicated, Kind::Wrong].map(|kind| report.findings.count(kind));
    assert_eq!(found, [0; 3]);
    assert!(
        report.acknowledged > 20 && report.acknowledged <= report.orders,
        "hardly any load: {}",
        report.line()
    );
    (report, ledger)
}

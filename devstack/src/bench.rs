//! `devstack bench`: the standard loads one after the other, each on a stack of its own, and a page of what came out.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::{
    binaries::Binaries,
    load::{self, Report, What},
    signals::Stop,
};

/// A load of the table, as `devstack load` reads it, and what it has to reach.
struct Row {
    what: &'static str,
    command: &'static str,
    bars: &'static [Bar],
}

/// A figure of [`Report::figure`] and its bound.
enum Bar {
    AtLeast(&'static str, f64),
    Below(&'static str, f64),
}

use Bar::{AtLeast, Below};

/// The ceiling comes first: the share of it is told of loads after it.
const ROWS: [Row; 19] = [
    Row {
        what: "the database alone: the same writes, batches of 64, no service",
        command: "ceiling --clients 64",
        bars: &[],
    },
    Row {
        what: "create, 64 callers",
        command: "create --clients 64",
        bars: &[
            AtLeast("per_second", 4_000.0),
            Below("p99_ms", 40.0),
            Below("memory_mib", 100.0),
        ],
    },
    Row {
        what: "create, 128 callers: enough that the database never waits for one",
        command: "create --clients 128",
        bars: &[
            AtLeast("per_second", 4_000.0),
            Below("p99_ms", 40.0),
            Below("memory_mib", 100.0),
            AtLeast("share_of_ceiling", 0.75),
        ],
    },
    Row {
        what: "create, popular SKUs",
        command: "create --clients 64 --skus zipf:0.99:1000",
        bars: &[AtLeast("per_second", 4_000.0)],
    },
    Row {
        what: "create, one SKU in every order",
        command: "create --clients 64 --skus hot:1",
        bars: &[AtLeast("per_second", 4_000.0), Below("refused", 1.0)],
    },
    Row {
        what: "create, 9 hot SKUs, 32 callers",
        command: "create --clients 32 --skus uniform:9",
        bars: &[Below("refused", 1.0)],
    },
    Row {
        what: "create, popular SKUs that run out",
        command: "create --clients 64 --scarce --skus zipf:0.99:1000",
        bars: &[],
    },
    Row {
        what: "create, 1 caller",
        command: "create --clients 1",
        bars: &[Below("p50_ms", 3.0)],
    },
    Row {
        what: "create, 1,000 a second on a schedule",
        command: "create --rate 1000",
        bars: &[],
    },
    Row {
        what: "pay, 64 callers",
        command: "pay --clients 64 --prepared 150000",
        bars: &[AtLeast("per_second", 4_000.0)],
    },
    Row {
        what: "whole orders: 80 % payed, 10 % cancelled, 10 % expire",
        command: "mixed --clients 64",
        bars: &[
            AtLeast("per_second", 2_000.0),
            Below("outbox_drained_s", 5.0),
        ],
    },
    Row {
        what: "Stocks, 32 callers",
        command: "stocks --clients 32",
        bars: &[AtLeast("per_second", 12_000.0)],
    },
    Row {
        what: "ListOrder, 32 callers",
        command: "list-order --clients 32",
        bars: &[AtLeast("per_second", 8_000.0)],
    },
    Row {
        what: "ListCart, 32 callers, 3 lines, prices cached",
        command: "list-cart --clients 32",
        bars: &[],
    },
    Row {
        what: "100,000 orders fall due at once, 64 callers create",
        command: "expiry --clients 64",
        bars: &[
            AtLeast("swept_per_second", 8_000.0),
            AtLeast("creates_of_before", 0.5),
        ],
    },
    Row {
        what: "ten times what a LOMS without batches and with 64 places can do; p99 of what is done",
        command: "overload --clients 32",
        bars: &[
            AtLeast("goodput_of_peak", 0.8),
            Below("p99_ms", 5_000.0),
            Below("refused_p99_ms", 100.0),
        ],
    },
    Row {
        what: "create, 2 replicas of LOMS",
        command: "create --clients 64 --replicas 2",
        bars: &[],
    },
    Row {
        what: "histories, 32 callers; before it, 200,000 events that have gathered are saved",
        command: "events --clients 32 --prepared 200000",
        bars: &[
            AtLeast("events_saved_per_second", 5_000.0),
            Below("p99_ms", 5.0),
        ],
    },
    Row {
        what: "the relay: 200,000 events that have gathered",
        command: "relay",
        bars: &[AtLeast("events_per_second", 10_000.0)],
    },
];

/// Reads a command of [`ROWS`].
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(subcommand)]
    what: What,
}

/// Runs the table, `seconds` for each load that has a duration, and writes the page.
pub async fn run(seconds: u64, page: &Path, binaries: &Binaries) -> Result<()> {
    let mut stop = Stop::listen()?;
    let mut text = String::new();
    let mut ceiling = None;
    let mut machine = None;
    for row in &ROWS {
        let seconds = seconds.to_string();
        let words = row.command.split(' ').chain(["--seconds", &seconds]);
        let what = Line::try_parse_from(words)?.what;
        let said = |report: Report| {
            print!("{}", report.text());
            report.expect_clean().map(|()| report)
        };
        let measured = load::measured(&what, Some(binaries.clone()), said);
        let report = stop.interrupts(measured).await?;
        ceiling = ceiling.or(report.figure("orders_per_second"));
        let bars: Vec<_> = row
            .bars
            .iter()
            .map(|bar| judge(bar, &report, ceiling))
            .collect();
        println!("  {}\n", bars.join("; "));
        write_row(&mut text, row, &report, &bars)?;
        machine.get_or_insert_with(|| report.machine_text());
    }
    let page_text = format!(
        "{HEAD}{}\n\n{seconds} s each, after a warm-up of 3 s. Closed loop unless it says otherwise: each caller has its next call \
         when it has\nthe answer to its last.\n\n{COLUMNS}{text}",
        machine.unwrap_or_default()
    );
    std::fs::write(page, page_text).with_context(|| format!("write {}", page.display()))
}

const HEAD: &str = "# Benchmarks\n\nWritten by `make bench`. Services, PostgreSQL, broker and the callers share the machine; \
                    full durability, TLS, idempotency keys,\nrelay and broker on; `loms audit` is clean after every load.\n\n";
const COLUMNS: &str = "| load | `devstack load` | a second | p50 ms | p99 ms | max ms | besides | asked for |\n|---|---|---|---|---|---|---|---|\n";

fn judge(bar: &Bar, report: &Report, ceiling: Option<f64>) -> String {
    let figure = |name: &str| match (name, ceiling) {
        ("share_of_ceiling", Some(ceiling)) => {
            report.figure("per_second").map(|rate| rate / ceiling)
        }
        _ => report.figure(name),
    };
    let (name, sign, bound, met) = match *bar {
        AtLeast(name, bound) => (name, "≥", bound, figure(name).map(|is| is >= bound)),
        Below(name, bound) => (name, "<", bound, figure(name).map(|is| is < bound)),
    };
    let is = figure(name).map_or("nothing".to_owned(), round);
    let verdict = if met == Some(true) {
        "met"
    } else {
        "**missed**"
    };
    format!("{name} {sign} {bound}: {is}, {verdict}")
}

fn write_row(text: &mut String, row: &Row, report: &Report, bars: &[String]) -> Result<()> {
    let figure = |name| report.figure(name).map(round).unwrap_or_default();
    let besides: Vec<_> = report
        .besides()
        .map(|(name, value)| format!("{name} {}", round(value)))
        .collect();
    writeln!(
        text,
        "| {} | `{}` | {} | {} | {} | {} | {} | {} |",
        row.what,
        row.command,
        figure("per_second"),
        figure("p50_ms"),
        figure("p99_ms"),
        figure("max_ms"),
        besides.join(", "),
        bars.join("; ")
    )?;
    Ok(())
}

fn round(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_a_command() {
        for row in &ROWS {
            let words = row.command.split(' ').chain(["--seconds", "1"]);
            assert!(Line::try_parse_from(words).is_ok(), "{}", row.command);
        }
    }
}

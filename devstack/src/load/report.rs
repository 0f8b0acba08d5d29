//! What a run found, with everything that its figures depend on: machine, versions, durability, TLS.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde::Serialize;
use sqlx::{Connection as _, PgConnection, Row as _};

use super::{measure::Figures, plans, statistics, target::Target};

/// Of the peak, what has to be done of ten times as much.
const LEAST_GOODPUT: f64 = 0.8;
/// `limits.request_timeout`: what is let in is answered within it.
const DEADLINE_MS: f64 = 5_000.0;

/// One run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(super) load: String,
    /// Callers, or calls a second.
    pub(super) pace: String,
    pub(super) orders: String,
    pub(super) seconds: u64,
    pub(super) figures: Option<Figures>,
    /// What else was measured, with its unit in its name.
    pub(super) measured: Vec<(String, f64)>,
    pub(super) costs: Costs,
    /// The service that is called.
    pub(super) service: &'static str,
    /// Its memory.
    pub(super) peak_memory_mib: Option<f64>,
    /// The last line of `loms audit`.
    pub(super) audit: Option<String>,
    pub(super) audit_clean: Option<bool>,
    pub(super) machine: Machine,
}

/// What the statements cost.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Costs {
    /// Nobody asked.
    Unknown,
    /// All calls of a load together.
    Load(Vec<statistics::Cost>),
    /// Plan by plan.
    Plans(Vec<plans::Cost>),
}

impl Costs {
    fn table(&self) -> Option<String> {
        match self {
            Costs::Unknown => None,
            Costs::Load(costs) => Some(statistics::table(costs)),
            Costs::Plans(costs) => Some(plans::table(costs)),
        }
    }
}

/// Where it ran.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_gib: f64,
    pub(super) build: &'static str,
    pub(super) version: &'static str,
    pub(super) tls: bool,
    pub(super) broker: String,
    pub(super) postgres: String,
}

impl Machine {
    /// This machine, and what the target stands on as far as it is ours to ask.
    pub(super) async fn of(target: &Target) -> Result<Machine> {
        let (broker, postgres) = match target.stack() {
            Some(stack) => (
                stack.broker().description().to_owned(),
                settings(stack.database("loms")?).await?,
            ),
            None => ("not ours".to_owned(), "not ours".to_owned()),
        };
        let (cpu, cores) = cpu();
        Ok(Machine {
            cpu,
            cores,
            memory_gib: memory_gib(),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
            version: env!("CARGO_PKG_VERSION"),
            tls: target.tls(),
            broker,
            postgres,
        })
    }
}

async fn settings(url: &str) -> Result<String> {
    let mut db = PgConnection::connect(url).await?;
    let mut said = String::new();
    for name in [
        "server_version",
        "fsync",
        "synchronous_commit",
        "full_page_writes",
        "shared_buffers",
        "max_wal_size",
    ] {
        let row = sqlx::query("SELECT current_setting($1)")
            .bind(name)
            .fetch_one(&mut db)
            .await?;
        let value: String = row.try_get(0)?;
        write!(
            said,
            "{}{name} {value}",
            if said.is_empty() { "" } else { ", " }
        )?;
    }
    Ok(said)
}

fn cpu() -> (String, usize) {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    (model.to_owned(), cores)
}

fn memory_gib() -> f64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    (kib.unwrap_or_default() / 1024.0 / 1024.0 * 10.0).round() / 10.0
}

impl Report {
    /// A figure by name: of the calls, of what else was measured, `memory_mib`, or `refused`, the calls that were not OK.
    pub(crate) fn figure(&self, name: &str) -> Option<f64> {
        let calls = self.figures.as_ref().and_then(|figures| match name {
            "per_second" => Some(figures.per_second),
            "p50_ms" => Some(figures.p50_ms),
            "p99_ms" => Some(figures.p99_ms),
            "max_ms" => Some(figures.max_ms),
            "refused" => Some(figures.refused as f64),
            "refused_p99_ms" => Some(figures.refused_p99_ms),
            _ => None,
        });
        let measured = self.measured.iter().find(|(measured, _)| measured == name);
        calls
            .or(measured.map(|(_, value)| *value))
            .or(self.peak_memory_mib.filter(|_| name == "memory_mib"))
    }

    /// # Errors
    /// `loms audit` has found something after the load.
    pub(crate) fn expect_clean(&self) -> Result<()> {
        ensure!(
            self.audit_clean != Some(false),
            "the audit found differences"
        );
        Ok(())
    }

    /// # Errors
    /// Asked for more than it can do, the system did much less than it can, or late.
    pub(crate) fn expect_goodput(&self) -> Result<()> {
        let goodput = self.figure("goodput_of_peak").unwrap_or_default();
        let p99 = self.figure("p99_ms").unwrap_or(f64::INFINITY);
        ensure!(
            goodput >= LEAST_GOODPUT && p99 < DEADLINE_MS,
            "overload: goodput {goodput:.2} of the peak, at least {LEAST_GOODPUT} is asked for; p99 of what was done \
             {p99:.0} ms, below {DEADLINE_MS} is"
        );
        Ok(())
    }

    /// What was measured beside the calls, with its unit in its name.
    pub(crate) fn besides(&self) -> impl Iterator<Item = (&str, f64)> {
        let measured = self.measured.iter();
        let memory = self.peak_memory_mib.map(|memory| ("memory_mib", memory));
        measured
            .map(|(name, value)| (name.as_str(), *value))
            .chain(memory)
    }

    /// Where it ran, for people.
    pub(crate) fn machine_text(&self) -> String {
        let machine = &self.machine;
        format!(
            "{} cores of {}, {} GiB; {} build {}; {}; PostgreSQL: {}",
            machine.cores,
            machine.cpu,
            machine.memory_gib,
            machine.build,
            machine.version,
            machine.broker,
            machine.postgres
        )
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} · {} · {} · {} s\n",
            self.load, self.pace, self.orders, self.seconds
        );
        if let Some(figures) = &self.figures {
            let _ = writeln!(
                text,
                "  {:.0} a second; p50 {:.2} ms, p90 {:.2}, p99 {:.2}, p99.9 {:.2}, max {:.1}",
                figures.per_second,
                figures.p50_ms,
                figures.p90_ms,
                figures.p99_ms,
                figures.p999_ms,
                figures.max_ms
            );
            let answers: Vec<_> = figures
                .answers
                .iter()
                .map(|(answer, count)| format!("{answer} {count}"))
                .collect();
            let _ = writeln!(text, "  {}", answers.join(", "));
            if figures.refused > 0 {
                let _ = writeln!(text, "  refused: p99 {:.2} ms", figures.refused_p99_ms);
            }
        }
        for (name, value) in &self.measured {
            let _ = writeln!(text, "  {name} {value:.2}");
        }
        if let Some(memory) = self.peak_memory_mib {
            let _ = writeln!(
                text,
                "  memory of {} {memory:.0} MiB at its peak",
                self.service
            );
        }
        if let Some(audit) = &self.audit {
            let _ = writeln!(text, "  {audit}");
        }
        if let Some(table) = self.costs.table() {
            let _ = write!(text, "\n{table}");
        }
        text
    }
}

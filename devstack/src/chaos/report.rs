//! What came out of a run: the figures, in a line and as JSON, and everything that is not as it must be.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use super::{
    calls::{Failure, Mark, Tally},
    facts::Facts,
    faults::{Done, Window},
    recount::{Findings, Kind, repeats},
    snapshot::Snapshot,
};
use crate::binaries::SERVICES;

/// A service works again so long after its database does, at the latest.
const BACK_BOUND: f64 = 5.0;
/// So long after a service was ready again, or the database answered, a caller may still meet an old connection.
const GRACE: Duration = Duration::from_secs(5);
/// Findings of one kind that are written out; the others are counted.
const SHOWN: usize = 25;

/// The figures of a run and its findings.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub seed: u64,
    pub seconds: f64,
    /// `Apache Kafka 4.1.0`, or the mock cluster.
    pub broker: String,
    pub orders: usize,
    pub orders_by_status: BTreeMap<&'static str, usize>,
    pub acknowledged: usize,
    /// By service, in the order of [`SERVICES`].
    pub kills: [usize; 3],
    pub broker_outages: usize,
    pub database_restarts: usize,
    pub calls: u64,
    pub unavailable: u64,
    pub deadline_exceeded: u64,
    pub cancelled: u64,
    pub broken_connections: u64,
    pub resource_exhausted: u64,
    pub asked_again: usize,
    pub events: usize,
    pub repeats_in_kafka: usize,
    pub lost: usize,
    pub duplicated: usize,
    pub wrong: usize,
    pub audit: Audit,
    /// Seconds from the stop of the database until it answered again, the slowest of all restarts.
    pub database_away_max_s: Option<f64>,
    /// Seconds from then until every service answered again, the slowest of all restarts.
    pub recovery_max_s: Option<f64>,
    pub settled_in_s: f64,
    pub findings: Findings,
}

/// What `loms audit` said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Audit {
    Clean,
    NotClean,
}

/// What a report is made of.
pub(super) struct Material<'a> {
    pub(super) seed: u64,
    pub(super) seconds: f64,
    pub(super) broker: String,
    pub(super) done: Done,
    pub(super) facts: &'a Facts,
    pub(super) tally: &'a Tally,
    pub(super) snapshot: &'a Snapshot,
    pub(super) findings: Findings,
    pub(super) audit: Audit,
    pub(super) asked_again: usize,
    pub(super) settled_in_s: f64,
}

impl Report {
    pub(super) fn new(material: Material<'_>) -> Report {
        let Material {
            done,
            tally,
            snapshot,
            mut findings,
            ..
        } = material;
        judge_calls(tally, &done.windows, &mut findings);
        let recovery_max_s = judge_recoveries(tally, &mut findings);
        Report {
            seed: material.seed,
            seconds: material.seconds,
            broker: material.broker,
            orders: snapshot.orders.len(),
            orders_by_status: by_status(snapshot),
            acknowledged: material.facts.acknowledged().len(),
            kills: done.kills,
            broker_outages: done.outages,
            database_restarts: done.restarts,
            calls: tally.codes.values().sum(),
            unavailable: tally.count("UNAVAILABLE"),
            deadline_exceeded: tally.count("DEADLINE_EXCEEDED"),
            cancelled: tally.count("CANCELLED"),
            broken_connections: tally.count("broken connection"),
            resource_exhausted: tally.count("RESOURCE_EXHAUSTED"),
            asked_again: material.asked_again,
            events: snapshot.changes.values().map(Vec::len).sum(),
            repeats_in_kafka: repeats(snapshot),
            lost: findings.count(Kind::Lost),
            duplicated: findings.count(Kind::Duplicated),
            wrong: findings.count(Kind::Wrong),
            audit: material.audit,
            database_away_max_s: slowest(tally.marks.iter().map(Mark::outage)),
            recovery_max_s,
            settled_in_s: material.settled_in_s,
            findings,
        }
    }

    /// Whether everything is as it must be.
    pub fn is_clean(&self) -> bool {
        self.findings.0.is_empty() && self.audit == Audit::Clean
    }

    /// The findings, a line each, so many of a kind.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for kind in [Kind::Lost, Kind::Duplicated, Kind::Wrong] {
            let of_kind = self.findings.0.iter().filter(|found| found.kind == kind);
            lines.extend(of_kind.take(SHOWN).map(ToString::to_string));
            let over = self.findings.count(kind).saturating_sub(SHOWN);
            if over > 0 {
                lines.push(format!("and {over} more"));
            }
        }
        lines
    }

    /// The figures on one line.
    pub fn line(&self) -> String {
        let kills: Vec<_> = SERVICES
            .iter()
            .zip(self.kills)
            .map(|(name, kills)| format!("{name} {kills}"))
            .collect();
        let recovery = match (self.database_away_max_s, self.recovery_max_s) {
            (Some(away), Some(back)) => {
                format!("; database away {away:.1} s at most, services back {back:.1} s after it")
            }
            _ => String::new(),
        };
        format!(
            "seed {}, {:.0} s on {}: {} orders, {} acknowledged; {} kills ({}), {} broker outages, {} database restarts; \
             {} events, {} repeats in Kafka; lost {}, duplicated {}, wrong {}, audit {}{recovery}",
            self.seed,
            self.seconds,
            self.broker,
            self.orders,
            self.acknowledged,
            self.kills.iter().sum::<usize>(),
            kills.join(", "),
            self.broker_outages,
            self.database_restarts,
            self.events,
            self.repeats_in_kafka,
            self.lost,
            self.duplicated,
            self.wrong,
            match self.audit {
                Audit::Clean => "clean",
                Audit::NotClean => "not clean",
            },
        )
    }
}

fn by_status(snapshot: &Snapshot) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for order in snapshot.orders.values() {
        *counts.entry(order.status.as_str()).or_default() += 1;
    }
    counts
}

fn judge_calls(tally: &Tally, windows: &[Window], findings: &mut Findings) {
    for surprise in &tally.surprises {
        findings.add(Kind::Wrong, surprise.clone());
    }
    let over = tally.surprised - tally.surprises.len() as u64;
    if over > 0 {
        findings.add(Kind::Wrong, format!("{over} more calls like these"));
    }
    let unexcused = |failure: &&Failure| {
        let meets = |(from, to): &Window| (*from..*to + GRACE).contains(&failure.ended);
        !windows.iter().any(meets)
    };
    let unexcused: Vec<_> = tally.failures.iter().filter(unexcused).collect();
    if let Some(first) = unexcused.first() {
        findings.add(
            Kind::Wrong,
            format!(
                "{} calls failed although no service was away, the first a {:?}: {:?}",
                unexcused.len(),
                first.method,
                first.code
            ),
        );
    }
}

/// The slowest recovery; one that is over the bound, or was not seen, is a finding.
fn judge_recoveries(tally: &Tally, findings: &mut Findings) -> Option<f64> {
    for mark in &tally.marks {
        for (service, seconds) in SERVICES.iter().zip(mark.recoveries()) {
            let what = match seconds {
                Some(seconds) if seconds <= BACK_BOUND => continue,
                Some(seconds) => format!("answered {seconds:.1} s after its database did"),
                None => "was not seen to answer after a database restart".to_owned(),
            };
            findings.add(Kind::Wrong, format!("{service} {what}"));
        }
    }
    slowest(tally.marks.iter().flat_map(Mark::recoveries))
}

fn slowest(seconds: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    seconds.flatten().reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tonic::Code;

    use super::*;
    use crate::chaos::calls::Method;

    fn found(tally: &Tally, windows: &[Window]) -> Vec<String> {
        let mut findings = Findings::default();
        judge_calls(tally, windows, &mut findings);
        judge_recoveries(tally, &mut findings);
        findings.0.into_iter().map(|found| found.what).collect()
    }

    #[test]
    fn only_a_fault_excuses_a_call_that_failed() {
        let now = Instant::now();
        let failed = |ended| Failure {
            method: Method::CreateOrder,
            code: Code::Unavailable,
            ended,
        };
        let window = (now, now + Duration::from_secs(2));
        let mut tally = Tally::default();
        tally.failures.push(failed(now + Duration::from_secs(6)));
        assert!(found(&tally, &[window]).is_empty());
        tally.failures.push(failed(now + Duration::from_secs(8)));
        assert_eq!(
            found(&tally, &[window]),
            ["1 calls failed although no service was away, the first a CreateOrder: Unavailable"]
        );
        assert!(found(&tally, &[])[0].starts_with("2 calls failed"));
    }

    #[test]
    fn an_answer_that_never_should_come_is_found() {
        let tally = Tally {
            surprises: vec!["CreateOrder of user 1: Internal: internal error".to_owned()],
            surprised: 3,
            ..Tally::default()
        };
        let all = found(&tally, &[]);
        assert_eq!(all.len(), 2);
        assert_eq!(all[1], "2 more calls like these");
    }

    #[test]
    fn a_service_that_is_late_or_never_back_is_found() {
        let now = Instant::now();
        let back = |seconds| Some(now + Duration::from_secs(seconds));
        let mut mark = Mark {
            from: now,
            gone: now,
            answered: back(1),
            back: [back(1), back(2), back(6)],
        };
        let mut tally = Tally::default();
        tally.marks.push(mark.clone());
        assert!(found(&tally, &[]).is_empty());
        assert_eq!(slowest(mark.recoveries().into_iter()), Some(5.0));
        mark.back = [None, back(2), back(7)];
        tally.marks.push(mark);
        assert_eq!(
            found(&tally, &[]),
            [
                "checkout was not seen to answer after a database restart",
                "notifications answered 6.0 s after its database did"
            ]
        );
    }
}

//! The recount: what must hold in the raw tables and the log, given what callers were told. Pure, and written apart from
//! the services and from `loms audit`, so that a mistake in one is not in the other.

mod events;
mod orders;
mod purchases;
mod stock;

#[cfg(test)]
mod tests;

use std::fmt;

use serde::Serialize;

use super::{facts::Facts, snapshot::Snapshot};

/// What kind of promise is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// What somebody was told, or what was committed, is not there.
    Lost,
    /// What must be there once is there twice.
    Duplicated,
    /// Two things that must agree do not, or an answer came that never should.
    Wrong,
}

/// One thing that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub kind: Kind,
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Lost => "lost",
            Kind::Duplicated => "duplicated",
            Kind::Wrong => "wrong",
        };
        write!(f, "{kind}: {}", self.what)
    }
}

/// Everything that is not as it must be.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    pub fn add(&mut self, kind: Kind, what: impl Into<String>) {
        let what = what.into();
        self.0.push(Finding { kind, what });
    }

    fn lost(&mut self, what: impl Into<String>) {
        self.add(Kind::Lost, what);
    }

    fn duplicated(&mut self, what: impl Into<String>) {
        self.add(Kind::Duplicated, what);
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.add(Kind::Wrong, what);
    }

    pub fn count(&self, kind: Kind) -> usize {
        self.0.iter().filter(|found| found.kind == kind).count()
    }
}

/// Judges everything.
pub(super) fn recount(snapshot: &Snapshot, facts: &Facts) -> Findings {
    let mut findings = Findings::default();
    for contradiction in &facts.contradictions {
        findings.wrong(contradiction);
    }
    stock::conserved(&snapshot.stock, &mut findings);
    stock::held_and_sold(snapshot, &mut findings);
    stock::deliveries(&snapshot.stock, facts, &mut findings);
    orders::asked(snapshot, facts, &mut findings);
    orders::keys(snapshot, &mut findings);
    orders::told(snapshot, facts, &mut findings);
    orders::histories(snapshot, &mut findings);
    purchases::told(snapshot, facts, &mut findings);
    purchases::one_order_each(snapshot, &mut findings);
    purchases::carts(snapshot, facts, &mut findings);
    events::published(snapshot, &mut findings);
    events::saved(snapshot, &mut findings);
    findings
}

pub(super) use events::repeats;

//! Orders: each that a caller was told of is there, once, with the lines that were asked for, in a status that follows from
//! what was told; each that nobody was told of is whole too.

use std::collections::{BTreeMap, BTreeSet};

use super::Findings;
use crate::chaos::{
    facts::{Facts, OrderFact, Refusal, Status},
    load::FIRST_BUYER,
    snapshot::{Change, Order, Snapshot},
};

/// Orders straight to LOMS, each of a user of its own: at most one a user, under the user's key.
pub(super) fn asked(snapshot: &Snapshot, facts: &Facts, findings: &mut Findings) {
    let mut by_user: BTreeMap<i64, Vec<(i64, &Order)>> = BTreeMap::new();
    for (id, order) in &snapshot.orders {
        if order.user >= FIRST_BUYER {
            by_user.entry(order.user).or_default().push((*id, order));
        }
    }
    for (user, fact) in &facts.orders {
        let made = by_user.remove(user).unwrap_or_default();
        if made.len() > 1 {
            let ids: Vec<_> = made.iter().map(|(id, _)| id).collect();
            findings.duplicated(format!("user {user} asked for one order and has {ids:?}"));
        }
        if let Some(told) = fact.order
            && !made.iter().any(|(id, _)| *id == told)
        {
            findings.lost(format!("order {told} of user {user} was acknowledged"));
        }
        for (id, order) in made {
            if order.lines != fact.lines {
                let (has, asked) = (&order.lines, &fact.lines);
                findings.wrong(format!(
                    "order {id} has the lines {has:?}, asked for {asked:?}"
                ));
            }
            key_of(snapshot, *user, fact, id, findings);
        }
    }
    for (user, made) in by_user {
        let ids: Vec<_> = made.iter().map(|(id, _)| id).collect();
        findings.wrong(format!(
            "nobody asked for the orders {ids:?} of user {user}"
        ));
    }
}

fn key_of(snapshot: &Snapshot, user: i64, fact: &OrderFact, id: i64, findings: &mut Findings) {
    let Some(key) = &fact.key else { return };
    match snapshot.keys.get(&(user, key.clone())) {
        Some(order) if *order == id => {}
        Some(order) => findings.wrong(format!(
            "the key of order {id} of user {user} stands for order {order}"
        )),
        None => findings.lost(format!("the key of order {id} of user {user}")),
    }
}

/// A key stands for an order that exists, and for one of its own.
pub(super) fn keys(snapshot: &Snapshot, findings: &mut Findings) {
    let mut taken = BTreeSet::new();
    for ((user, key), order) in &snapshot.keys {
        match snapshot.orders.get(order) {
            Some(found) if found.user == *user => {}
            Some(found) => findings.wrong(format!(
                "the key {key} of user {user} stands for order {order} of user {}",
                found.user
            )),
            None => findings.lost(format!("order {order} of user {user}, which has a key")),
        }
        if !taken.insert(order) {
            findings.wrong(format!("two keys stand for order {order}"));
        }
    }
}

/// The status that was told, or a later one; what was refused has not happened.
pub(super) fn told(snapshot: &Snapshot, facts: &Facts, findings: &mut Findings) {
    for (id, seen) in &facts.statuses {
        let Some(order) = snapshot.orders.get(id) else {
            findings.lost(format!("order {id} was seen {seen:?}"));
            continue;
        };
        for status in seen {
            if !status.may_become(order.status) {
                findings.lost(format!(
                    "order {id} was seen {} and is {}",
                    status.as_str(),
                    order.status.as_str()
                ));
            }
        }
    }
    for (id, refusals) in &facts.refusals {
        let status = snapshot.orders.get(id).map(|order| order.status);
        let done = |refusal: &Refusal| match refusal {
            Refusal::Payment => status == Some(Status::Payed),
            Refusal::Cancellation => status == Some(Status::Cancelled),
        };
        for refusal in refusals.iter().filter(|refusal| done(refusal)) {
            findings.wrong(format!("order {id}: {refusal:?} was refused and is done"));
        }
    }
}

/// Every order has a history without a gap that ends in its status; no history is without an order.
pub(super) fn histories(snapshot: &Snapshot, findings: &mut Findings) {
    for (id, order) in &snapshot.orders {
        let history = snapshot.changes.get(id).map_or(&[][..], Vec::as_slice);
        if !is_legal(history) || history.last().map(|last| last.to) != Some(order.status) {
            let steps: Vec<_> = history
                .iter()
                .map(|step| (step.sequence, step.to))
                .collect();
            let status = order.status.as_str();
            findings.wrong(format!("order {id} is {status} and its history {steps:?}"));
        }
        if order.lines.is_empty() {
            findings.wrong(format!("order {id} has no lines"));
        }
    }
    for id in snapshot.changes.keys() {
        if !snapshot.orders.contains_key(id) {
            findings.lost(format!("order {id}, which has a history"));
        }
    }
}

fn is_legal(history: &[Change]) -> bool {
    let mut before = None;
    for (place, change) in (1..).zip(history) {
        let follows = match (before, change.to) {
            (None, to) => to == Status::New,
            (Some(Status::New), to) => matches!(to, Status::AwaitingPayment | Status::Failed),
            (Some(from), to) => from != to && from.may_become(to),
        };
        if change.sequence != place || change.from != before || !follows {
            return false;
        }
        before = Some(change.to);
    }
    // placing an order is one decision: nobody ever sees it new
    history.len() >= 2
}

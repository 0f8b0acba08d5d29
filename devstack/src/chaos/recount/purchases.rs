//! Purchases: each has one order, or none where none can be, and every unit that was put into a cart is in it or bought.

use std::collections::{BTreeMap, BTreeSet};

use super::Findings;
use crate::chaos::{
    facts::{Facts, PurchaseFact, Status},
    load::FIRST_BUYER,
    snapshot::{Purchase, Snapshot},
};

/// What the user was told is what the row says.
pub(super) fn told(snapshot: &Snapshot, facts: &Facts, findings: &mut Findings) {
    let key = |row: &Purchase| Some((row.user, row.key.clone()?));
    let by_key: BTreeMap<_, _> = snapshot
        .purchases
        .iter()
        .filter_map(|row| Some((key(row)?, row)))
        .collect();
    for (name, fact) in &facts.purchases {
        let expected = match fact {
            PurchaseFact::Asked => continue,
            PurchaseFact::Made(order) => Some(("made", *order)),
            PurchaseFact::Failed(order) => Some(("failed", *order)),
            PurchaseFact::Cancelled(order) => Some(("cancelled", *order)),
            PurchaseFact::Empty => None,
        };
        let row = by_key.get(name);
        let found = row.and_then(|row| Some((row.outcome.as_deref()?, row.order?)));
        if row.is_none() && expected.is_some() {
            findings.lost(format!("the purchase {name:?}, which was told {fact:?}"));
        } else if found != expected {
            findings.wrong(format!(
                "the purchase {name:?} was told {fact:?}, is {found:?}"
            ));
        }
    }
}

/// Every purchase is closed and has one order: its user's, with its lines, under its id as the key, in a status that fits.
pub(super) fn one_order_each(snapshot: &Snapshot, findings: &mut Findings) {
    let mut bought = BTreeSet::new();
    for purchase in &snapshot.purchases {
        let (id, user) = (&purchase.id, purchase.user);
        let (Some(outcome), Some(order)) = (purchase.outcome.as_deref(), purchase.order) else {
            let outcome = &purchase.outcome;
            findings.wrong(format!(
                "the purchase {id} of user {user} ended as {outcome:?}"
            ));
            continue;
        };
        if !bought.insert(order) {
            findings.duplicated(format!("order {order} belongs to two purchases"));
        }
        let Some(row) = snapshot.orders.get(&order) else {
            findings.lost(format!("order {order} of the purchase {id}"));
            continue;
        };
        if row.user != user || row.lines != purchase.lines {
            findings.wrong(format!("order {order} differs from the purchase {id}"));
        }
        if snapshot.keys.get(&(user, id.clone())) != Some(&order) {
            findings.wrong(format!("the purchase {id} is not the key of order {order}"));
        }
        let fits = match outcome {
            "made" => Status::AwaitingPayment.may_become(row.status),
            "failed" => row.status == Status::Failed,
            "cancelled" => row.status == Status::Cancelled,
            _ => false,
        };
        if !fits {
            let status = row.status.as_str();
            findings.wrong(format!(
                "the purchase {id} is {outcome}, its order {order} is {status}"
            ));
        }
    }
    for (id, order) in &snapshot.orders {
        if order.user < FIRST_BUYER && !bought.contains(id) {
            let user = order.user;
            findings.duplicated(format!("order {id} of user {user} belongs to no purchase"));
        }
    }
}

/// Units in the cart and units bought are the units that were added: at least those that were acknowledged, at most those
/// that were asked for.
pub(super) fn carts(snapshot: &Snapshot, facts: &Facts, findings: &mut Findings) {
    let mut there = snapshot.carts.clone();
    let made = snapshot.purchases.iter();
    for purchase in made.filter(|row| row.outcome.as_deref() == Some("made")) {
        for (sku, count) in &purchase.lines {
            *there.entry((purchase.user, *sku)).or_default() += count;
        }
    }
    for (place, added) in &facts.carts {
        let units = there.remove(place).unwrap_or_default();
        let (user, sku) = place;
        let what = format!(
            "user {user} added {} to {} units of SKU {sku} and has {units}",
            added.sure, added.possible
        );
        if units < added.sure {
            findings.lost(what);
        } else if units > added.possible {
            findings.duplicated(what);
        }
    }
    for ((user, sku), units) in there {
        findings.wrong(format!(
            "user {user} has {units} units of SKU {sku} and added none"
        ));
    }
}

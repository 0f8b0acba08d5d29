//! Units: none appears, none vanishes, and each is where the status of its order says.

use std::collections::{BTreeMap, BTreeSet};

use super::Findings;
use crate::chaos::{
    facts::{Facts, Lines, Status},
    snapshot::{Snapshot, Stock, Units},
};

/// On sale + reserved + written off = delivered, by warehouse and SKU.
pub(super) fn conserved(stock: &Stock, findings: &mut Findings) {
    let mut units = stock.on_sale.clone();
    for (&(_, warehouse, sku), count) in stock.reserved.iter().chain(&stock.written_off) {
        *units.entry((warehouse, sku)).or_default() += count;
    }
    let mut delivered: BTreeMap<(i64, i64), i64> = BTreeMap::new();
    for (place, count) in stock.delivered.values().flatten() {
        *delivered.entry(*place).or_default() += count;
    }
    let places: BTreeSet<_> = units.keys().chain(delivered.keys()).collect();
    for place in places {
        let there = units.get(place).copied().unwrap_or_default();
        let came = delivered.get(place).copied().unwrap_or_default();
        let (warehouse, sku) = place;
        let what =
            format!("units of SKU {sku} in warehouse {warehouse}: {came} delivered, {there} there");
        if there < came {
            findings.lost(what);
        } else if there > came {
            findings.duplicated(what);
        }
    }
}

/// What awaits payment holds exactly its lines and has a deadline; what is payed has exactly its lines written off.
pub(super) fn held_and_sold(snapshot: &Snapshot, findings: &mut Findings) {
    let (mut held, mut sold) = (
        by_order(&snapshot.stock.reserved),
        by_order(&snapshot.stock.written_off),
    );
    let nothing = Lines::new();
    for (id, order) in &snapshot.orders {
        let awaits = order.status == Status::AwaitingPayment;
        let payed = order.status == Status::Payed;
        let (held, sold) = (
            held.remove(id).unwrap_or_default(),
            sold.remove(id).unwrap_or_default(),
        );
        let status = order.status.as_str();
        if held != *if awaits { &order.lines } else { &nothing } {
            findings.wrong(format!("order {id} is {status} and holds {held:?}"));
        }
        if sold != *if payed { &order.lines } else { &nothing } {
            findings.wrong(format!("order {id} is {status} and has sold {sold:?}"));
        }
        if order.unpaid != awaits {
            findings.wrong(format!(
                "order {id} is {status}, a payment deadline: {}",
                order.unpaid
            ));
        }
    }
    for (id, lines) in held.into_iter().chain(sold) {
        findings.wrong(format!("order {id} does not exist and has {lines:?}"));
    }
}

fn by_order(units: &Units) -> BTreeMap<i64, Lines> {
    let mut orders: BTreeMap<i64, Lines> = BTreeMap::new();
    for (&(order, _, sku), count) in units {
        *orders.entry(order).or_default().entry(sku).or_default() += count;
    }
    orders
}

/// Every delivery is there as it was sent, or not at all; one that was acknowledged is there.
pub(super) fn deliveries(stock: &Stock, facts: &Facts, findings: &mut Findings) {
    for (id, fact) in &facts.deliveries {
        match stock.delivered.get(id) {
            Some(lines) if *lines == fact.lines => {}
            Some(lines) => findings.wrong(format!("{id} has the lines {lines:?}")),
            None if fact.received => findings.lost(format!("{id} was acknowledged")),
            None => {}
        }
    }
}

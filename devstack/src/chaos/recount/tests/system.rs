//! A small system in which everything is as it must be.

use std::collections::BTreeMap;

use crate::chaos::{
    facts::{DeliveryFact, Facts, Lines, PurchaseFact, Refusal, Status},
    log::{Event, Record},
    snapshot::{Change, Message, Order, Purchase, Snapshot},
};

pub(super) const BUYER: i64 = 1_000_001;
pub(super) const SHOPPER: i64 = 1;

/// Order 1 of a buyer is payed, order 2 of a shopper awaits payment, and order 3, of the shopper's second cart, failed.
pub(super) fn system() -> (Snapshot, Facts) {
    let mut snapshot = Snapshot::default();
    let delivery = BTreeMap::from([((1, 7), 10), ((2, 7), 5)]);
    snapshot
        .stock
        .delivered
        .insert("d".to_owned(), delivery.clone());
    snapshot.stock.on_sale = BTreeMap::from([((1, 7), 6), ((2, 7), 5)]);
    snapshot.stock.written_off.insert((1, 1, 7), 3);
    snapshot.stock.reserved.insert((2, 1, 7), 1);
    place(&mut snapshot, 1, BUYER, Status::Payed, 3, "k");
    place(&mut snapshot, 2, SHOPPER, Status::AwaitingPayment, 1, "p2");
    place(&mut snapshot, 3, SHOPPER, Status::Failed, 2, "p3");
    for (id, outcome, order, units) in [("p2", "made", 2, 1), ("p3", "failed", 3, 2)] {
        snapshot.purchases.push(Purchase {
            id: id.to_owned(),
            user: SHOPPER,
            key: Some(format!("key-{id}")),
            outcome: Some(outcome.to_owned()),
            order: Some(order),
            lines: Lines::from([(7, units)]),
        });
    }
    snapshot.carts.insert((SHOPPER, 7), 2);

    let mut facts = Facts::default();
    facts.ask_order(BUYER, Some("k".to_owned()), Lines::from([(7, 3)]));
    facts.order_placed(BUYER, 1, Status::AwaitingPayment);
    facts.reached(1, Status::Payed);
    facts.refused(1, Refusal::Cancellation);
    facts.ask_units(SHOPPER, 7, 3);
    facts.units_answered(SHOPPER, 7, 3, true);
    facts.purchase_ended(SHOPPER, "key-p2", PurchaseFact::Made(2));
    facts.purchase_ended(SHOPPER, "key-p3", PurchaseFact::Failed(3));
    let received = DeliveryFact {
        lines: delivery,
        received: true,
    };
    facts.deliveries.insert("d".to_owned(), received);
    (snapshot, facts)
}

/// An order with its history, its events and its messages.
pub(super) fn place(
    snapshot: &mut Snapshot,
    id: i64,
    user: i64,
    status: Status,
    units: i64,
    key: &str,
) {
    let steps = match status {
        Status::Failed => vec![Status::New, Status::Failed],
        Status::AwaitingPayment => vec![Status::New, Status::AwaitingPayment],
        end => vec![Status::New, Status::AwaitingPayment, end],
    };
    let order = Order {
        user,
        status,
        lines: Lines::from([(7, units)]),
        unpaid: status == Status::AwaitingPayment,
    };
    snapshot.orders.insert(id, order);
    snapshot.keys.insert((user, key.to_owned()), id);
    let mut from = None;
    for (sequence, to) in (1..).zip(steps) {
        let change = Change { sequence, from, to };
        snapshot.changes.entry(id).or_default().push(change);
        from = Some(to);
        let event = event(id, user, sequence, to.as_str());
        snapshot.messages.push(Message {
            user,
            order: id,
            sequence,
            status: event.status.clone(),
        });
        snapshot.log.records.push(record(event));
    }
}

pub(super) fn event(order: i64, user: i64, sequence: i64, status: &str) -> Event {
    Event {
        user,
        order,
        status: status.to_owned(),
        sequence,
    }
}

pub(super) fn record(event: Event) -> Record {
    Record {
        partition: 0,
        key: event.order.to_string(),
        event: Ok(event),
    }
}

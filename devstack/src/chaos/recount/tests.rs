//! The recount of a small system in which everything is as it must be, and of the same system with one thing changed by
//! hand: every kind of finding is found.

mod system;

use std::collections::BTreeMap;

use self::system::{BUYER, SHOPPER, event, place, record, system};
use super::{Findings, Kind, recount, repeats};
use crate::chaos::{
    facts::{Added, DeliveryFact, Facts, Lines, OrderFact, Refusal, Status},
    snapshot::{Order, Snapshot},
};

fn row<'a>(snapshot: &'a mut Snapshot, id: &i64) -> &'a mut Order {
    snapshot.orders.get_mut(id).unwrap()
}

/// What is found after `change`: a finding of the kind whose words contain `words`.
fn finds(kind: Kind, words: &str, change: impl FnOnce(&mut Snapshot, &mut Facts)) {
    let (mut snapshot, mut facts) = system();
    change(&mut snapshot, &mut facts);
    let Findings(found) = recount(&snapshot, &facts);
    assert!(
        found
            .iter()
            .any(|found| found.kind == kind && found.what.contains(words)),
        "{kind:?} {words:?} is not in {found:#?}"
    );
}

#[test]
fn a_system_as_it_must_be_has_no_findings() {
    let (mut snapshot, facts) = system();
    let Findings(found) = recount(&snapshot, &facts);
    assert!(found.is_empty(), "{found:#?}");
    // repeats may follow, as long as each first occurrence is in order
    let again = snapshot.log.records.clone();
    snapshot.log.records.extend(again);
    assert!(recount(&snapshot, &facts).0.is_empty());
    assert_eq!(repeats(&snapshot), 7);
}

#[test]
fn unit_drift_is_found() {
    finds(Kind::Lost, "10 delivered, 9 there", |snapshot, _| {
        *snapshot.stock.on_sale.get_mut(&(1, 7)).unwrap() -= 1;
    });
    finds(Kind::Duplicated, "5 delivered, 6 there", |snapshot, _| {
        *snapshot.stock.on_sale.get_mut(&(2, 7)).unwrap() += 1;
    });
    finds(
        Kind::Wrong,
        "order 2 is awaiting payment and holds",
        |snapshot, _| {
            snapshot.stock.reserved.clear();
        },
    );
    finds(
        Kind::Wrong,
        "order 1 is payed and has sold",
        |snapshot, _| {
            snapshot.stock.written_off.insert((1, 2, 7), 1);
        },
    );
    finds(Kind::Wrong, "order 9 does not exist", |snapshot, _| {
        snapshot.stock.reserved.insert((9, 1, 7), 1);
    });
    finds(Kind::Wrong, "a payment deadline: false", |snapshot, _| {
        row(snapshot, &2).unpaid = false;
    });
    finds(Kind::Lost, "d was acknowledged", |snapshot, _| {
        snapshot.stock.delivered.clear();
    });
    finds(Kind::Wrong, "d has the lines", |_, facts| {
        facts.deliveries.get_mut("d").unwrap().lines.clear();
    });
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table is read from top to bottom")]
fn order_drift_is_found() {
    finds(Kind::Lost, "order 1 of user 1000001", |snapshot, _| {
        snapshot.orders.remove(&1);
    });
    finds(Kind::Lost, "order 1, which has a history", |snapshot, _| {
        snapshot.orders.remove(&1);
    });
    finds(Kind::Lost, "order 1 was seen", |snapshot, _| {
        snapshot.orders.remove(&1);
    });
    finds(
        Kind::Duplicated,
        "asked for one order and has [1, 4]",
        |snapshot, _| {
            place(snapshot, 4, BUYER, Status::Failed, 3, "other");
        },
    );
    finds(
        Kind::Wrong,
        "nobody asked for the orders [4]",
        |snapshot, _| {
            place(snapshot, 4, BUYER + 1, Status::Failed, 3, "k");
        },
    );
    finds(Kind::Wrong, "order 1 has the lines", |snapshot, _| {
        row(snapshot, &1).lines.insert(8, 1);
    });
    finds(Kind::Wrong, "order 1 has no lines", |snapshot, _| {
        row(snapshot, &1).lines.clear();
    });
    finds(
        Kind::Lost,
        "order 1 was seen payed and is cancelled",
        |snapshot, _| {
            row(snapshot, &1).status = Status::Cancelled;
        },
    );
    finds(
        Kind::Wrong,
        "Payment was refused and is done",
        |_, facts| {
            facts.refused(1, Refusal::Payment);
        },
    );
    finds(Kind::Wrong, "Cancellation was refused", |snapshot, _| {
        row(snapshot, &1).status = Status::Cancelled;
    });
    finds(
        Kind::Wrong,
        "order 1 is payed and its history",
        |snapshot, _| {
            snapshot.changes.get_mut(&1).unwrap().remove(1);
        },
    );
    finds(
        Kind::Wrong,
        "order 3 is failed and its history",
        |snapshot, _| {
            snapshot.changes.get_mut(&3).unwrap()[1].from = None;
        },
    );
    finds(Kind::Wrong, "two answers", |_, facts| {
        facts.contradictions.push("two answers".to_owned());
    });
}

#[test]
fn key_drift_is_found() {
    finds(Kind::Lost, "the key of order 1", |snapshot, _| {
        snapshot.keys.remove(&(BUYER, "k".to_owned()));
    });
    finds(Kind::Wrong, "stands for order 3", |snapshot, _| {
        snapshot.keys.insert((BUYER, "k".to_owned()), 3);
    });
    finds(
        Kind::Lost,
        "order 9 of user 5, which has a key",
        |snapshot, _| {
            snapshot.keys.insert((5, "k".to_owned()), 9);
        },
    );
    finds(Kind::Wrong, "two keys stand for order 1", |snapshot, _| {
        snapshot.keys.insert((BUYER, "k2".to_owned()), 1);
    });
}

#[test]
fn purchase_drift_is_found() {
    finds(Kind::Lost, "the purchase (1, \"key-p2\")", |snapshot, _| {
        snapshot.purchases.remove(0);
    });
    finds(
        Kind::Duplicated,
        "order 2 of user 1 belongs to no purchase",
        |snapshot, _| {
            snapshot.purchases.remove(0);
        },
    );
    finds(
        Kind::Wrong,
        "was told Made(2), is Some((\"failed\", 2))",
        |snapshot, _| {
            snapshot.purchases[0].outcome = Some("failed".to_owned());
        },
    );
    finds(Kind::Wrong, "ended as None", |snapshot, _| {
        snapshot.purchases[0].outcome = None;
    });
    finds(
        Kind::Duplicated,
        "order 2 belongs to two purchases",
        |snapshot, _| {
            snapshot.purchases[1].order = Some(2);
        },
    );
    finds(Kind::Lost, "order 9 of the purchase p2", |snapshot, _| {
        snapshot.purchases[0].order = Some(9);
    });
    finds(
        Kind::Wrong,
        "order 2 differs from the purchase p2",
        |snapshot, _| {
            snapshot.purchases[0].lines.insert(7, 4);
        },
    );
    finds(
        Kind::Wrong,
        "the purchase p2 is not the key of order 2",
        |snapshot, _| {
            snapshot.purchases[0].user = 9;
        },
    );
    finds(
        Kind::Wrong,
        "the purchase p2 is made, its order 2 is failed",
        |snapshot, _| {
            row(snapshot, &2).status = Status::Failed;
        },
    );
}

#[test]
fn cart_drift_is_found() {
    finds(
        Kind::Lost,
        "added 3 to 3 units of SKU 7 and has 2",
        |snapshot, _| {
            snapshot.carts.insert((SHOPPER, 7), 1);
        },
    );
    finds(
        Kind::Duplicated,
        "added 3 to 3 units of SKU 7 and has 4",
        |snapshot, _| {
            snapshot.carts.insert((SHOPPER, 7), 3);
        },
    );
    finds(
        Kind::Wrong,
        "has 1 units of SKU 8 and added none",
        |snapshot, _| {
            snapshot.carts.insert((SHOPPER, 8), 1);
        },
    );
}

#[test]
fn event_drift_is_found() {
    finds(
        Kind::Lost,
        "event 3 (payed) of order 1 is not in Kafka",
        |snapshot, _| {
            snapshot.log.records.remove(2);
        },
    );
    finds(
        Kind::Wrong,
        "the events of order 1 came as [2, 1, 3]",
        |snapshot, _| {
            snapshot.log.records.swap(0, 1);
        },
    );
    finds(
        Kind::Wrong,
        "order 1 is in the partitions {0, 1}",
        |snapshot, _| {
            snapshot.log.records[0].partition = 1;
        },
    );
    finds(Kind::Wrong, "was never committed", |snapshot, _| {
        snapshot
            .log
            .records
            .push(record(event(1, BUYER, 3, "cancelled")));
    });
    finds(Kind::Wrong, "was never committed", |snapshot, _| {
        snapshot.log.records.push(record(event(9, BUYER, 1, "new")));
    });
    finds(
        Kind::Wrong,
        "an event of order 1 has the key 2",
        |snapshot, _| {
            snapshot.log.records[0].key = "2".to_owned();
        },
    );
    finds(
        Kind::Wrong,
        "an event cannot be read: cut",
        |snapshot, _| {
            snapshot.log.records[0].event = Err("cut".to_owned());
        },
    );
    finds(Kind::Wrong, "1 dead letters", |snapshot, _| {
        snapshot.log.dead_letters = 1
    });
    finds(Kind::Wrong, "the broker dropped 4", |snapshot, _| {
        snapshot.log.dropped = 4
    });
    finds(Kind::Wrong, "2 events wait in the outbox", |snapshot, _| {
        snapshot.outbox = 2
    });
}

#[test]
fn message_drift_is_found() {
    finds(
        Kind::Lost,
        "event 1 of order 1 is not in Notifications",
        |snapshot, _| {
            snapshot.messages.remove(0);
        },
    );
    finds(
        Kind::Duplicated,
        "message 1 of order 1 is there 2 times",
        |snapshot, _| {
            let copy = snapshot.messages[0].clone();
            snapshot.messages.push(copy);
        },
    );
    finds(Kind::Wrong, "was never committed", |snapshot, _| {
        snapshot.messages[0].user = 5;
    });
}

#[test]
fn what_nobody_was_told_is_not_missed() {
    let (snapshot, mut facts) = system();
    let fact = OrderFact {
        key: Some("k9".to_owned()),
        lines: Lines::from([(7, 1)]),
        order: None,
    };
    facts.orders.insert(BUYER + 9, fact);
    facts.ask_purchase(SHOPPER + 9, "never answered");
    let asked = Added {
        sure: 0,
        possible: 2,
    };
    facts.carts.insert((SHOPPER + 9, 7), asked);
    let fact = DeliveryFact {
        lines: BTreeMap::from([((1, 7), 10)]),
        received: false,
    };
    facts.deliveries.insert("never answered".to_owned(), fact);
    let Findings(found) = recount(&snapshot, &facts);
    assert!(found.is_empty(), "{found:#?}");
}

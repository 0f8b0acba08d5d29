//! Callers of LOMS without a cart: orders under a key and without one, deliveries, and those who only look.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use proto::{
    loms::{CreateOrderRequest, OrderItem, ReceiveStockRequest, StockLine, StocksRequest},
    notifications::GetHistoryWithPeriodRequest,
};
use rand::Rng as _;

use super::{
    calls::{Answer, Caller, Method},
    facts::{DeliveryFact, Lines, Status},
    load::{Shelf, WAREHOUSES},
    shoppers::finish,
};
use crate::clients::period_around_now;

/// Between two things that one caller does.
const THINK: Duration = Duration::from_millis(150);
/// Between two deliveries, at most: about as much comes as is sold.
const DELIVERY: Duration = Duration::from_millis(2500);
/// Of a hundred orders, so many have no key and are asked for once.
const KEYLESS: u32 = 15;

/// Places orders until the end, each for a user of its own.
pub(super) async fn order(mut caller: Caller, shelf: Shelf, users: Arc<AtomicI64>) {
    while caller.think(THINK).await {
        let user = users.fetch_add(1, Ordering::Relaxed);
        let keyless = caller.random.random_ratio(KEYLESS, 100);
        let key = (!keyless).then(|| format!("order-{user}"));
        let lines = draw_lines(&mut caller, &shelf);
        let facts = caller.ledger.clone();
        facts.facts().ask_order(user, key.clone(), lines.clone());
        // without an answer to a call that has no key nobody can know whether there is an order
        if let Some((order, Status::AwaitingPayment)) = place(&mut caller, user, key, &lines).await
        {
            finish(&mut caller, order).await;
        }
    }
}

fn draw_lines(caller: &mut Caller, shelf: &Shelf) -> Lines {
    let mut lines = Lines::new();
    for _ in 0..caller.random.random_range(1..=4) {
        let sku = i64::from(shelf.pick(&mut caller.random));
        *lines.entry(sku).or_default() += caller.random.random_range(1..=5);
    }
    lines
}

/// Places the order, or finds the one that the key has made, and notes the answer.
pub(super) async fn place(
    caller: &mut Caller,
    user: i64,
    key: Option<String>,
    lines: &Lines,
) -> Option<(i64, Status)> {
    let keyless = key.is_none();
    let request = CreateOrderRequest {
        user,
        items: items(lines),
        idempotency_key: key.unwrap_or_default(),
    };
    let loms = caller.clients.loms.clone();
    let ask = |request: CreateOrderRequest| {
        let mut loms = loms.clone();
        async move { loms.create_order(request).await }
    };
    let about = format!("user {user}");
    let placed = if keyless {
        match caller
            .call(Method::CreateOrder, &about, ask(request.clone()))
            .await
        {
            Answer::Done(placed) => placed,
            Answer::Refused(_) | Answer::Unknown => return None,
        }
    } else {
        if caller.random.random_ratio(1, 10) {
            let one = (Method::CreateOrder, ask(request.clone()));
            let other = (Method::CreateOrder, ask(request.clone()));
            caller.both(&about, one, other).await;
        }
        let answer = caller.insist(Method::CreateOrder, &about, || ask(request.clone()));
        answer.await?.ok()?
    };
    let mut facts = caller.ledger.facts();
    match Status::parse(&placed.status) {
        Some(status) => {
            facts.order_placed(user, placed.order_id, status);
            Some((placed.order_id, status))
        }
        None => {
            let what = format!("order {} is {:?}", placed.order_id, placed.status);
            facts.contradictions.push(what);
            None
        }
    }
}

/// Odd units on a line of their own: one SKU on two lines is one line.
fn items(lines: &Lines) -> Vec<OrderItem> {
    let item = |sku: i64, count: i64| OrderItem {
        sku: u32::try_from(sku).unwrap_or_default(),
        count: u32::try_from(count).unwrap_or_default(),
    };
    let split = lines.iter().flat_map(|(&sku, &count)| match count {
        3 => vec![item(sku, 2), item(sku, 1)],
        _ => vec![item(sku, count)],
    });
    // of two orders with the same SKUs one has them in the opposite order
    let mut items: Vec<_> = split.collect();
    if lines.values().sum::<i64>() % 2 == 0 {
        items.reverse();
    }
    items
}

/// Brings stock until the end, so that not everything fails for want of it.
pub(super) async fn deliver(mut caller: Caller, shelf: Shelf, first: i64) {
    let mut number = first;
    while caller.think(DELIVERY).await {
        number += 1;
        let id = format!("delivery-{number}");
        let mut lines = std::collections::BTreeMap::new();
        for _ in 0..6 {
            let warehouse = caller.random.random_range(1..=WAREHOUSES);
            let sku = i64::from(shelf.pick(&mut caller.random));
            *lines.entry((warehouse, sku)).or_default() += caller.random.random_range(5..=25);
        }
        let fact = DeliveryFact {
            lines,
            received: false,
        };
        let request = ReceiveStockRequest {
            delivery_id: id.clone(),
            lines: stock_lines(&fact),
        };
        caller.ledger.facts().deliveries.insert(id.clone(), fact);
        let loms = caller.clients.loms.clone();
        let answer = caller.insist(Method::ReceiveStock, &id, || {
            let (mut loms, request) = (loms.clone(), request.clone());
            async move { loms.receive_stock(request).await }
        });
        if let Some(Ok(_)) = answer.await
            && let Some(fact) = caller.ledger.facts().deliveries.get_mut(&id)
        {
            fact.received = true;
        }
    }
}

fn stock_lines(fact: &DeliveryFact) -> Vec<StockLine> {
    let line = |(&(warehouse_id, sku), &count): (&(i64, i64), &i64)| StockLine {
        warehouse_id,
        sku: u32::try_from(sku).unwrap_or_default(),
        count: count.unsigned_abs(),
    };
    fact.lines.iter().map(line).collect()
}

/// Asks for stock and histories until the end.
pub(super) async fn look(mut caller: Caller, shelf: Shelf, users: Arc<AtomicI64>) {
    while caller.think(THINK).await {
        let sku = shelf.pick(&mut caller.random);
        let mut loms = caller.clients.loms.clone();
        let stocks = loms.stocks(StocksRequest { sku });
        let about = format!("SKU {sku}");
        caller.call(Method::Stocks, &about, stocks).await;
        let user = users.load(Ordering::Relaxed).max(2) - 1;
        let (from, to) = period_around_now();
        let mut notifications = caller.clients.notifications.clone();
        let history = notifications.get_history_with_period(GetHistoryWithPeriodRequest {
            user,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        });
        let about = format!("user {user}");
        caller.call(Method::GetHistory, &about, history).await;
    }
}

//! Callers that buy through the cart: add, purchase under a key, then pay, cancel or leave the order to its deadline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use proto::{
    cart::{AddToCartRequest, PurchaseRequest},
    loms::{CancelOrderRequest, OrderPayedRequest},
};
use rand::Rng as _;
use tonic::Status as GrpcStatus;

use super::{
    calls::{Answer, Caller, Method},
    facts::{PurchaseFact, Refusal, Status},
    load::Shelf,
};
use crate::clients::error_info;

/// Between two things that one caller does.
const THINK: Duration = Duration::from_millis(120);
/// A shopper gives a cart that cannot be bought up after so many purchases: the lines must then stay in it.
const ROUNDS: usize = 3;

/// Shops as one user after another until the end.
pub(super) async fn shop(mut caller: Caller, shelf: Shelf, users: Arc<AtomicI64>) {
    while !caller.closing.is_cancelled() {
        let user = users.fetch_add(1, Ordering::Relaxed);
        for round in 0..ROUNDS {
            let filled = fill_cart(&mut caller, &shelf, user).await;
            let key = format!("purchase-{round}");
            let Some(fact) = purchase(&mut caller, user, &key).await else {
                return;
            };
            if let PurchaseFact::Made(order) = fact {
                finish(&mut caller, order).await;
            }
            if fact == PurchaseFact::Empty && filled {
                let what = format!("user {user} found an empty cart after units were added to it");
                caller.ledger.facts().contradictions.push(what);
            }
            if !caller.think(THINK).await {
                return;
            }
        }
    }
}

/// Adds a few lines; whether at least one was acknowledged.
async fn fill_cart(caller: &mut Caller, shelf: &Shelf, user: i64) -> bool {
    let mut filled = false;
    for _ in 0..caller.random.random_range(1..=3) {
        let (sku, count) = (
            shelf.pick(&mut caller.random),
            caller.random.random_range(1..=3),
        );
        let (line, units) = (i64::from(sku), i64::from(count));
        caller.ledger.facts().ask_units(user, line, units);
        let mut cart = caller.clients.cart.clone();
        let call = cart.add_to_cart(AddToCartRequest { user, sku, count });
        // not repeated without an answer: it has no key
        let answer = caller
            .call(Method::AddToCart, &format!("user {user}"), call)
            .await;
        let added = match answer {
            Answer::Done(_) => true,
            Answer::Refused(_) => false,
            Answer::Unknown => continue,
        };
        caller
            .ledger
            .facts()
            .units_answered(user, line, units, added);
        filled |= added;
        if !caller.think(THINK).await {
            break;
        }
    }
    filled
}

/// Purchases until there is an answer; now and then twice at once, as a double click does.
pub(super) async fn purchase(caller: &mut Caller, user: i64, key: &str) -> Option<PurchaseFact> {
    caller.ledger.facts().ask_purchase(user, key);
    let cart = caller.clients.cart.clone();
    let request = PurchaseRequest {
        user,
        idempotency_key: key.to_owned(),
    };
    let ask = |request: PurchaseRequest| {
        let mut cart = cart.clone();
        async move { cart.purchase(request).await }
    };
    let about = format!("user {user}");
    if caller.random.random_ratio(1, 10) {
        let one = (Method::Purchase, ask(request.clone()));
        let other = (Method::Purchase, ask(request.clone()));
        caller.both(&about, one, other).await;
    }
    let answer = caller.insist(Method::Purchase, &about, || ask(request.clone()));
    let fact = match answer.await? {
        Ok(made) => PurchaseFact::Made(made.order_id),
        Err(status) => refused(&status).unwrap_or_else(|| {
            let what = format!("Purchase of {about}: {}", status.message());
            caller.ledger.facts().contradictions.push(what);
            PurchaseFact::Asked
        }),
    };
    caller.ledger.facts().purchase_ended(user, key, fact);
    Some(fact)
}

/// How a purchase that was refused has ended; `None` for a reason that a shopper does not expect.
fn refused(status: &GrpcStatus) -> Option<PurchaseFact> {
    let info = error_info(status)?;
    let order = || info.metadata.get("order_id")?.parse().ok();
    match info.reason.as_str() {
        "INSUFFICIENT_STOCK" => order().map(PurchaseFact::Failed),
        "ORDER_CANCELLED" => order().map(PurchaseFact::Cancelled),
        "EMPTY_CART" => Some(PurchaseFact::Empty),
        _ => None,
    }
}

/// What becomes of an order that awaits payment: most are paid, some cancelled, some both at once, some forgotten.
pub(super) async fn finish(caller: &mut Caller, order: i64) {
    if !caller.think(THINK).await {
        return;
    }
    match caller.random.random_range(0..10) {
        0..6 => pay(caller, order).await,
        6..7 => cancel(caller, order).await,
        7..8 => {
            // which of the two wins is found out afterwards
            let (mut one, mut other) = (caller.clients.loms.clone(), caller.clients.loms.clone());
            let paying = one.order_payed(OrderPayedRequest { order_id: order });
            let cancelling = other.cancel_order(CancelOrderRequest { order_id: order });
            let paying = (Method::OrderPayed, paying);
            let cancelling = (Method::CancelOrder, cancelling);
            let about = format!("order {order}");
            caller.both(&about, paying, cancelling).await;
            pay(caller, order).await;
            cancel(caller, order).await;
        }
        _ => {}
    }
}

async fn pay(caller: &mut Caller, order: i64) {
    let loms = caller.clients.loms.clone();
    let about = format!("order {order}");
    let answer = caller.insist(Method::OrderPayed, &about, || {
        let mut loms = loms.clone();
        async move {
            loms.order_payed(OrderPayedRequest { order_id: order })
                .await
        }
    });
    let answer = answer.await;
    let mut facts = caller.ledger.facts();
    match answer {
        Some(Ok(_)) => facts.reached(order, Status::Payed),
        Some(Err(_)) => facts.refused(order, Refusal::Payment),
        None => {}
    }
}

async fn cancel(caller: &mut Caller, order: i64) {
    let loms = caller.clients.loms.clone();
    let about = format!("order {order}");
    let answer = caller.insist(Method::CancelOrder, &about, || {
        let mut loms = loms.clone();
        async move {
            loms.cancel_order(CancelOrderRequest { order_id: order })
                .await
        }
    });
    let answer = answer.await;
    let mut facts = caller.ledger.facts();
    match answer {
        Some(Ok(_)) => facts.reached(order, Status::Cancelled),
        Some(Err(_)) => facts.refused(order, Refusal::Cancellation),
        None => {}
    }
}

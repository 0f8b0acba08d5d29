//! Beside a LOMS that ignores idempotency keys, as the system before this one does: an order is
//! sent to it once, a cancellation too, whatever is lost and whichever LOMS comes next.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tonic::Code;

use crate::{
    loms_stub::Mood,
    proxy::{Line, Proxy},
    test_app::{Neighbours, TestApp, eventually, no_worker, refused},
};

/// Checkout, and the two selves of LOMS, which have the same orders.
struct Shop {
    app: TestApp,
    line: Proxy,
    keeps: SocketAddr,
    ignores: SocketAddr,
}

/// User 1 has two units of SKU 5 in the cart, of 100 on sale.
async fn shop(ignores_keys: bool, changes: Value) -> Shop {
    let pool = crate::database().await;
    let mut neighbours = Neighbours::start().await;
    let keeps = neighbours.addresses[0];
    let ignores = neighbours.loms.ignoring_keys(&mut neighbours.serving).await;
    let first = if ignores_keys { ignores } else { keeps };
    let line = Proxy::start(first.to_string()).await;
    neighbours.addresses[0] = line.address;
    let app = TestApp::beside(neighbours, pool, changes).await;
    app.loms.stock(5, 100);
    app.add(1, 5, 2).await.unwrap();
    Shop {
        app,
        line,
        keeps,
        ignores,
    }
}

impl Shop {
    /// The other LOMS comes in place of this one.
    async fn replace(&self, by: SocketAddr) {
        self.line.lead_to(by.to_string());
        // until it is gone, a connection of the one before may be used
        let gone = async || {
            let asked = self.app.add(2, 5, 1).await;
            asked.is_err_and(|status| status.code() == Code::Unavailable)
        };
        eventually("the LOMS before is gone", gone).await;
        self.line.set(Line::Up);
        let back = async || self.app.add(2, 5, 1).await.is_ok();
        eventually("the other LOMS is there", back).await;
    }

    /// As if five minutes had gone by, and the worker's time had come.
    async fn grow_old(&self) {
        let aged = "UPDATE checkout.purchase
                    SET created_at = created_at - interval '5 minutes', sent_at = sent_at - interval '5 minutes',
                        cancel_sent_at = cancel_sent_at - interval '5 minutes', next_attempt_at = clock_timestamp()";
        sqlx::query(aged).execute(&self.app.pool).await.unwrap();
    }

    /// The purchase is given up: its lines are back, its user is told ORDER_OUTCOME_UNKNOWN.
    async fn is_unknown(&self) -> Option<String> {
        let app = &self.app;
        let closed = async || app.open_purchases().await == 0;
        eventually("the purchase is closed", closed).await;
        assert_eq!(app.cart(1).await, [(5, 2)], "the lines are back");
        // with another key than the one that it has, the call would be about the cart
        app.delete(1, 5, 2).await.unwrap();
        let told = refused(
            app.purchase(1).await,
            Code::FailedPrecondition,
            "ORDER_OUTCOME_UNKNOWN",
        );
        told.get("order_id").cloned()
    }

    /// An operator has cancelled the orders of unknown purchases.
    async fn finish(self) {
        for order in self.app.loms.orders() {
            self.app.loms.set_status(order.id, "cancelled");
        }
        self.app.finish().await;
    }
}

async fn assert_lost(app: &TestApp) {
    let status = app.purchase(1).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

#[tokio::test]
async fn a_purchase_is_made_and_its_status_asked_for() {
    let shop = shop(true, json!({})).await;
    let app = &shop.app;
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    assert_eq!(app.loms.on_sale(5), 98);
    let said = async || {
        let report: Value = app.get("/readyz").await.json().await.unwrap();
        report["loms"] == "ok, it ignores idempotency keys"
    };
    eventually("readiness says what LOMS is", said).await;
    app.loms.stock(5, 1);
    app.add(3, 5, 1).await.unwrap();
    app.loms.stock(5, 0);
    let missing = app.purchase(3).await;
    refused(missing, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
    shop.app.finish().await;
}

#[tokio::test]
async fn an_order_whose_answer_is_lost_is_not_sent_again() {
    let shop = shop(true, json!({})).await;
    let app = &shop.app;
    app.loms.mood(Mood::LosesAnswers);
    assert_lost(app).await;
    app.loms.mood(Mood::Well);
    // neither by its caller nor by the worker, which comes every 200 ms
    for _ in 0..20 {
        assert_lost(app).await;
    }
    assert_eq!(app.cart(1).await, [], "the lines wait");
    shop.grow_old().await;
    assert_eq!(shop.is_unknown().await, None);
    assert_eq!(app.loms.order_calls(), 1);
    let metrics = app.get("/metrics").await.text().await.unwrap();
    let counted = "checkout_counter_purchases_closed_total{outcome=\"unknown\"}";
    assert!(metrics.contains(counted), "{metrics}");
    shop.finish().await;
}

#[tokio::test]
async fn what_one_loms_may_have_is_not_sent_to_its_other_self() {
    for ignores_first in [true, false] {
        let shop = shop(ignores_first, no_worker()).await;
        let app = &shop.app;
        app.loms.mood(Mood::LosesAnswers);
        assert_lost(app).await;
        app.loms.mood(Mood::Well);
        let (first, other) = if ignores_first {
            (shop.ignores, shop.keeps)
        } else {
            (shop.keeps, shop.ignores)
        };
        shop.replace(other).await;
        assert_lost(app).await;
        assert_eq!(app.loms.orders().len(), 1);
        if ignores_first {
            shop.grow_old().await;
            assert_eq!(shop.is_unknown().await, None);
            shop.finish().await;
            continue;
        }
        // the one that keeps keys may be asked again, and knows
        shop.replace(first).await;
        assert_eq!(app.purchase(1).await.unwrap(), 1);
        assert_eq!(app.loms.orders().len(), 1);
        shop.app.finish().await;
    }
}

#[tokio::test]
async fn a_purchase_that_was_never_sent_is_sent_once() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    shop.line.set(Line::Cut);
    assert_lost(app).await;
    shop.line.set(Line::Up);
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    assert_eq!(app.loms.order_calls(), 1);
    shop.app.finish().await;
}

#[tokio::test]
async fn a_cancellation_whose_answer_is_lost_is_not_sent_again() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    app.loms.mood(Mood::HidesOrders);
    assert_lost(app).await;
    app.loms.mood(Mood::LosesAnswers);
    shop.grow_old().await;
    let sent = async || app.loms.orders()[0].status == "cancelled";
    eventually("the worker cancels", sent).await;
    // as if the cancellation had not come to be seen yet
    app.loms.set_status(1, "awaiting payment");
    for _ in 0..5 {
        assert_lost(app).await;
    }
    app.loms.set_status(1, "cancelled");
    app.loms.mood(Mood::Well);
    let told = app.purchase(1).await;
    refused(told, Code::FailedPrecondition, "ORDER_CANCELLED");
    assert_eq!(app.loms.on_sale(5), 100, "given back once");
    shop.app.finish().await;
}

#[tokio::test]
async fn an_order_that_stays_new_is_given_up_by_its_number() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    app.loms.mood(Mood::LeavesNew);
    assert_lost(app).await;
    assert_lost(app).await;
    shop.grow_old().await;
    assert_eq!(shop.is_unknown().await.as_deref(), Some("1"));
    assert_eq!(app.loms.order_calls(), 1);
    shop.finish().await;
}

#[tokio::test]
async fn a_cancellation_that_is_lost_for_good_does_not_hold_the_cart() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    app.loms.mood(Mood::HidesOrders);
    assert_lost(app).await;
    app.loms.mood(Mood::LosesAnswers);
    shop.grow_old().await;
    let sent = async || app.loms.orders()[0].status == "cancelled";
    eventually("the worker cancels", sent).await;
    app.loms.set_status(1, "awaiting payment");
    app.loms.mood(Mood::Well);
    assert_lost(app).await;
    shop.grow_old().await;
    assert_eq!(shop.is_unknown().await.as_deref(), Some("1"));
    assert_eq!(app.loms.on_sale(5), 100, "given back once");
    shop.finish().await;
}

#[tokio::test]
async fn an_old_purchase_that_was_never_sent_makes_no_order() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    shop.line.set(Line::Cut);
    assert_lost(app).await;
    shop.grow_old().await;
    shop.line.set(Line::Up);
    let closed = async || app.open_purchases().await == 0;
    eventually("the purchase is closed", closed).await;
    assert_eq!(app.cart(1).await, [(5, 2)], "the lines are back");
    assert_eq!(app.loms.order_calls(), 0);
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    shop.app.finish().await;
}

#[tokio::test]
async fn another_users_order_of_the_same_number_is_left_alone() {
    let shop = shop(true, no_worker()).await;
    let app = &shop.app;
    app.loms.mood(Mood::HidesOrders);
    assert_lost(app).await;
    // the LOMS that is there now has given the number to somebody else
    app.loms.set_user(1, 77);
    app.loms.mood(Mood::Well);
    assert_lost(app).await;
    shop.grow_old().await;
    assert_eq!(shop.is_unknown().await.as_deref(), Some("1"));
    assert_eq!(app.loms.orders()[0].status, "awaiting payment");
    shop.finish().await;
}

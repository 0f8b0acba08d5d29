//! The contract's table of refusals for the cart, the purchase and the history, each row over gRPC and over HTTP.

use devstack::clients::{Door, period_around_now, reason};
use proto::{
    cart::{DeleteFromCartRequest, PurchaseRequest},
    loms::{ListOrderRequest, StocksRequest},
    notifications::{Date, GetHistoryWithPeriodRequest},
};
use serde_json::json;
use tonic::Code;

use crate::{
    caller::{Caller, assert_refused},
    test_stack::TestStack,
};

/// In supply.
const HEART: u32 = 85_123_001;
/// One unit in all.
const JARS: u32 = 85_159_001;
/// More than a cart's line may have.
const PLENTY: u32 = 84_029_005;

#[tokio::test]
async fn the_cart_refuses_over_both_doors() {
    let stack = TestStack::start(&[(1, HEART, 10), (1, JARS, 1), (1, PLENTY, 100_000)]).await;
    let caller = Caller(stack.clients.clone());
    let body = |user: i64, sku: u32, count: u32| json!({"user": user, "sku": sku, "count": count});
    for (user, sku, count) in [
        (0, HEART, 1),
        (-1, HEART, 1),
        (1, 0, 1),
        (1, HEART, 0),
        (1, HEART, 65_536),
    ] {
        let http = caller
            .post(Door::Checkout, "/addToCart", body(user, sku, count))
            .await;
        assert_refused(
            caller.add(user, sku, count).await,
            &http,
            Code::InvalidArgument,
            "",
        );
        let http = caller
            .post(Door::Checkout, "/deleteFromCart", body(user, sku, count))
            .await;
        let request = DeleteFromCartRequest { user, sku, count };
        let grpc = caller.0.cart.clone().delete_from_cart(request).await;
        assert_refused(grpc, &http, Code::InvalidArgument, "");
    }
    // every bad field at once
    let http = caller.post(Door::Checkout, "/addToCart", json!({})).await;
    let violations = http.body["details"][0]["fieldViolations"]
        .as_array()
        .expect("a BadRequest")
        .len();
    assert_eq!(violations, 3, "{}", http.body);
    assert_eq!(
        http.body["details"][0]["@type"],
        "type.googleapis.com/google.rpc.BadRequest"
    );

    caller.add(1, HEART, 8).await.unwrap();
    let http = caller
        .post(Door::Checkout, "/addToCart", body(1, HEART, 3))
        .await;
    assert_refused(
        caller.add(1, HEART, 3).await,
        &http,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    caller.add(2, PLENTY, 65_535).await.unwrap();
    let http = caller
        .post(Door::Checkout, "/addToCart", body(2, PLENTY, 1))
        .await;
    assert_refused(
        caller.add(2, PLENTY, 1).await,
        &http,
        Code::FailedPrecondition,
        "CART_FULL",
    );

    let http = caller
        .post(Door::Checkout, "/deleteFromCart", body(1, PLENTY, 1))
        .await;
    let request = DeleteFromCartRequest {
        user: 1,
        sku: PLENTY,
        count: 1,
    };
    let grpc = caller
        .0
        .cart
        .clone()
        .delete_from_cart(request)
        .await
        .expect_err("a refusal");
    assert_eq!((grpc.code(), http.status), (Code::NotFound, 404));
    let more_than_held = DeleteFromCartRequest {
        user: 1,
        sku: HEART,
        count: 60_000,
    };
    caller
        .0
        .cart
        .clone()
        .delete_from_cart(more_than_held)
        .await
        .expect("the line goes away");
    let http = caller
        .post(Door::Checkout, "/purchase", json!({"user": 1}))
        .await;
    let grpc = caller
        .0
        .cart
        .clone()
        .purchase(PurchaseRequest {
            user: 1,
            ..Default::default()
        })
        .await;
    assert_refused(grpc, &http, Code::FailedPrecondition, "EMPTY_CART");
    let http = caller
        .post(
            Door::Checkout,
            "/purchase",
            json!({"user": 2, "idempotencyKey": "ключ"}),
        )
        .await;
    let key = "ключ".to_owned();
    let grpc = caller
        .0
        .cart
        .clone()
        .purchase(PurchaseRequest {
            user: 2,
            idempotency_key: key,
        })
        .await;
    assert_refused(grpc, &http, Code::InvalidArgument, "");
    stack.finish().await;
}

#[tokio::test]
async fn a_purchase_without_the_stock_names_order_and_shortages() {
    let stack = TestStack::start(&[(1, HEART, 10), (1, JARS, 1)]).await;
    let caller = Caller(stack.clients.clone());
    for user in [3, 4] {
        caller.add(user, JARS, 1).await.unwrap();
        caller.add(user, HEART, 2).await.unwrap();
    }
    let bought = caller.purchase(3, "once").await.unwrap();
    assert_eq!(
        caller.purchase(3, "once").await.unwrap(),
        bought,
        "a retry with its key is the same purchase"
    );
    let cart = caller
        .post(Door::Checkout, "/listCart", json!({"user": 4}))
        .await;
    let status = caller.purchase(4, "").await.expect_err("the jars are gone");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "INSUFFICIENT_STOCK")
    );
    let http = caller
        .post(Door::Checkout, "/purchase", json!({"user": 4}))
        .await;
    assert_eq!(
        (http.status, http.reason()),
        (400, Some("INSUFFICIENT_STOCK")),
        "{}",
        http.body
    );
    assert!(
        http.body.to_string().contains(&JARS.to_string()),
        "the shortage is named: {}",
        http.body
    );
    let info = devstack::clients::error_info(&status).expect("an ErrorInfo");
    let order = info.metadata["order_id"]
        .parse()
        .expect("the order is named");
    let order = caller
        .0
        .loms
        .clone()
        .list_order(ListOrderRequest { order_id: order })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((order.status.as_str(), order.user), ("failed", 4));
    let after = caller
        .post(Door::Checkout, "/listCart", json!({"user": 4}))
        .await;
    assert_eq!(after.body, cart.body, "the cart is as it was");
    let stocks = caller
        .0
        .loms
        .clone()
        .stocks(StocksRequest { sku: HEART })
        .await
        .unwrap()
        .into_inner()
        .stocks;
    assert_eq!(
        stocks[0].count, 8,
        "nothing stays reserved for the order that failed"
    );
    stack.finish().await;
}

#[tokio::test]
async fn notifications_refuses_over_both_doors() {
    let stack = TestStack::start(&[]).await;
    let caller = Caller(stack.clients.clone());
    let (from, to) = period_around_now();
    let no_such_day = Date {
        year: 2026,
        month: 2,
        day: 30,
    };
    for (user, from, to) in [
        (0, from, to),
        (1, no_such_day, to),
        (1, from, no_such_day),
        (1, to, from),
    ] {
        let request = GetHistoryWithPeriodRequest {
            user,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        };
        let grpc = caller
            .0
            .notifications
            .clone()
            .get_history_with_period(request)
            .await;
        let body = json!({"user": user, "from": from, "to": to});
        let http = caller.post(Door::Notifications, "/history", body).await;
        assert_refused(grpc, &http, Code::InvalidArgument, "");
    }
    stack.finish().await;
}

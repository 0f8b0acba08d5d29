//! Too much, too late, too long: every wait has an end and every queue a bound.

use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::loms::{CancelOrderRequest, StocksRequest};
use serde_json::json;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::{
    oracle,
    process::Process,
    test_app::{TestApp, arrived, eventually, lock_waiters, order, sit_on},
};

#[tokio::test]
async fn one_call_too_many_is_refused_at_once() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"limits": {"in_flight": 2}})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    let (one, other) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    let held = sit_on(&pool, "loms.user_order").await;
    let third = async {
        lock_waiters(&pool, 2).await;
        let started = Instant::now();
        let refused = app.pay(one).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.metadata().contains_key("x-trace-id"));
        let answer = app.post("/stocks", "{\"sku\":7}").await;
        assert_eq!((answer.status, &answer.json()["code"]), (429, &json!(8)));
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "{:?}",
            started.elapsed()
        );
        held.rollback().await.unwrap();
    };
    let (one, other, ()) = tokio::join!(app.pay(one), app.cancel(other), third);
    one.unwrap();
    other.unwrap();
    app.stocks(7).await;
    app.finish().await;
}

/// One connection to the database, and a peer that has asked for it many times.
#[tokio::test]
async fn a_call_of_another_peer_is_not_behind_all_of_one() {
    let pool = crate::database().await;
    let postgres = json!({"max_connections": 1, "lock_timeout": "500ms", "acquire_timeout": "20s"});
    let (process, config) = Process::with_stock(&pool, postgres).await;
    let (one, mut other) = (process.client(), process.client());
    eventually("a database", async || {
        let asked = one.clone().stocks(StocksRequest { sku: 7 }).await;
        asked.is_ok()
    })
    .await;
    let mut orders = Vec::new();
    for _ in 0..21 {
        let made = one.clone().create_order(order(1, &[(7, 1)], "")).await;
        orders.push(made.unwrap().into_inner().order_id);
    }
    let free = orders.pop().unwrap();
    let held = sit_on(&pool, &format!("loms.user_order WHERE id <> {free}")).await;
    // each takes lock_timeout, one after another
    let of_one = join_all(orders.into_iter().map(|order_id| {
        let mut one = one.clone();
        async move { one.cancel_order(CancelOrderRequest { order_id }).await }
    }));
    let of_other = async {
        eventually("the calls of one", async || process.waiting().await > 14).await;
        let began = Instant::now();
        let request = CancelOrderRequest { order_id: free };
        other.cancel_order(request).await.unwrap();
        began.elapsed()
    };
    let (of_one, of_other) = tokio::join!(of_one, of_other);
    // behind all of them it would be 7 s
    assert!(of_other < Duration::from_secs(4), "{of_other:?}");
    for refused in of_one {
        assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
    }
    held.rollback().await.unwrap();
    assert!(process.stop().await.success());
    drop(config);
}

#[tokio::test]
async fn a_full_queue_of_orders_refuses_and_goes_on() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"orders": {"queue": 2}})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let held = sit_on(&pool, "loms.stock").await;
    let rest = async {
        lock_waiters(&pool, 1).await;
        let mut calls = Box::pin(join_all(
            (0..5).map(|_| app.try_create(order(1, &[(7, 1)], ""))),
        ));
        let refused = async {
            // two fit, three are told at once; what is refused leaves no trace to wait for but its answer
            arrived(&app).await;
            held.rollback().await.unwrap();
        };
        tokio::join!(&mut calls, refused).0
    };
    let (first, rest) = tokio::join!(app.create(1, &[(7, 1)]), rest);
    assert_eq!(first.status, "awaiting payment");
    let refused: Vec<_> = rest.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 3);
    for status in refused {
        assert_eq!(status.code(), Code::ResourceExhausted);
        let reason = status.get_details_error_info().expect("ErrorInfo").reason;
        assert_eq!(reason, "PLACEMENT_QUEUE_FULL");
    }
    assert_eq!(app.create(1, &[(7, 1)]).await.status, "awaiting payment");
    app.finish().await;
}

#[tokio::test]
async fn a_deadline_that_passes_is_told_in_time() {
    let pool = crate::database().await;
    // who waits for what is held waits longer than anybody's deadline
    let changes =
        json!({"limits": {"request_timeout": "3s"}, "postgres": {"statement_timeout": "10s"}});
    let app = TestApp::start(&pool, changes).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let held = sit_on(&pool, "loms.stock").await;
    let started = Instant::now();
    let by_header = async {
        let body = r#"{"user":1,"items":[{"sku":7,"count":1}]}"#;
        let request = app
            .request("/createOrder")
            .header("grpc-timeout", "200m")
            .body(body);
        let answer = app.send(request).await;
        assert_eq!((answer.status, &answer.json()["code"]), (504, &json!(4)));
        started.elapsed()
    };
    // waits behind the first, and is dropped from the queue when its caller has had its answer
    let by_limit = async {
        lock_waiters(&pool, 1).await;
        let late = app.try_create(order(2, &[(7, 1)], "")).await.unwrap_err();
        assert_eq!(late.code(), Code::DeadlineExceeded);
        started.elapsed()
    };
    let (header, limit) = tokio::join!(by_header, by_limit);
    assert!(header < Duration::from_millis(2_500), "{header:?}");
    assert!(limit < Duration::from_secs(8), "{limit:?}");
    held.rollback().await.unwrap();
    assert_eq!(app.create(3, &[(7, 1)]).await.status, "awaiting payment");
    let of_two = "SELECT count(*) FROM loms.user_order WHERE user_id = 2";
    assert_eq!(oracle::count(&pool, of_two).await, 0);
    app.finish().await;
}

/// A stream that watches has no deadline and no end of its own; calls on its connection go on.
#[tokio::test]
async fn streams_that_watch_end_and_calls_go_on() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"limits": {"connection_age": "1s"}})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let mut health = HealthClient::new(app.channel.clone());
    let watch = health.watch(HealthCheckRequest::default()).await;
    let mut watch = watch.unwrap().into_inner();
    let ends = async {
        loop {
            match watch.message().await {
                Ok(Some(_)) => {}
                ended => break ended,
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(20), ends).await;
    let status = ended.expect("an end").expect_err("a reason");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    app.stocks(7).await;
    app.finish().await;
}

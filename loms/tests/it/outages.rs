//! The broker or the database away: what goes on, what is refused, and that everything is there afterwards.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use tonic::Code;

use crate::{
    kafka, oracle,
    proxy::{Proxy, database_behind_proxy},
    test_app::{TestApp, eventually, order, scale},
};

const WAITING: &str = "SELECT count(*) FROM loms.outbox";

#[tokio::test]
async fn orders_go_on_without_a_broker_and_events_follow() {
    let pool = crate::database().await;
    let mut broker = Proxy::closed(&kafka::brokers());
    let outbox = json!({"broker_timeout": "300ms", "poll_interval": "50ms"});
    let app = TestApp::start(
        &pool,
        json!({"brokers": [broker.address.to_string()], "outbox": outbox}),
    )
    .await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let id = app.create(1, &[(7, 1)]).await.order_id;
    app.pay(id).await.unwrap();
    let ready = app.get("/readyz").await;
    assert_eq!(ready.status, 200);
    let report = ready.json();
    assert_eq!(
        (&report["ready"], &report["database"]),
        (&json!(true), &json!("ok"))
    );
    assert_ne!(report["kafka"], "ok");
    assert_eq!(oracle::count(&pool, WAITING).await, 3);
    broker.open();
    eventually("a broker that is back", async || {
        app.get("/readyz").await.json()["kafka"] == "ok"
    })
    .await;
    app.finish().await;
}

const CALLERS: u32 = 16;

/// Orders, each payed, from several callers; what 99 calls of 100 took at most. A call that fails fails the test.
async fn trade(app: &TestApp, orders: u32) -> Duration {
    let callers = join_all((0..CALLERS).map(async |caller| {
        let mut took = Vec::new();
        for _ in 0..orders / CALLERS {
            let started = Instant::now();
            let order = app
                .create(1 + i64::from(caller), &[(1 + caller % 5, 1)])
                .await;
            took.push(started.elapsed());
            assert_eq!(order.status, "awaiting payment");
            let started = Instant::now();
            app.pay(order.order_id).await.unwrap();
            took.push(started.elapsed());
        }
        took
    }));
    let mut took = callers.await.concat();
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test]
async fn a_broker_that_goes_away_again_and_again_costs_callers_nothing() {
    let pool = crate::database().await;
    let orders = 256 * scale() as u32;
    let mut broker = Proxy::before_broker(&kafka::brokers());
    broker.open();
    let outbox = json!({"broker_timeout": "1s", "poll_interval": "50ms"});
    let app = TestApp::start(
        &pool,
        json!({"brokers": [broker.address.to_string()], "outbox": outbox}),
    )
    .await;
    let stock: Vec<_> = (1..=5).map(|sku| (1, sku, 1_000_000)).collect();
    app.receive("d1", &stock).await.unwrap();
    trade(&app, orders / 4).await;
    // by turns, and the best of each: whatever else the machine does hurts both
    let (mut there, mut away) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        there.push(trade(&app, orders).await);
        eventually("an empty outbox", async || {
            oracle::count(&pool, WAITING).await == 0
        })
        .await;
        broker.cut().await;
        away.push(trade(&app, orders).await);
        // new, awaiting payment, payed
        assert_eq!(oracle::count(&pool, WAITING).await, 3 * i64::from(orders));
        broker.open();
        eventually("an empty outbox again", async || {
            oracle::count(&pool, WAITING).await == 0
        })
        .await;
    }
    println!("p99 with the broker there {there:?}, away {away:?}");
    assert!(
        away.iter().min() < there.iter().min().map(|best| *best * 2).as_ref(),
        "there {there:?}, away {away:?}"
    );
    app.finish().await;
}

#[tokio::test]
async fn events_follow_when_the_topic_appears() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    let outbox = json!({"broker_timeout": "300ms", "poll_interval": "50ms"});
    let app = TestApp::start(&pool, json!({"kafka": {"topic": topic}, "outbox": outbox})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(app.create(1, &[(7, 1)]).await.order_id);
    }
    let ready = app.get("/readyz").await;
    assert_eq!(
        (ready.status, &ready.json()["kafka"]),
        (200, &json!(format!("topic {topic} is missing")))
    );
    assert_eq!(oracle::count(&pool, WAITING).await, 10);
    kafka::create_topic(&topic).await;
    for id in ids {
        app.cancel(id).await.unwrap();
    }
    app.finish().await;
}

#[tokio::test]
async fn without_the_database_callers_hear_unavailable_and_soon() {
    let pool = crate::database().await;
    let (mut database, connection_string) = database_behind_proxy(&pool);
    let app = TestApp::start(
        &pool,
        json!({"postgres": {"connection_string": connection_string, "acquire_timeout": "1s"}}),
    )
    .await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let id = app.create(1, &[(7, 1)]).await.order_id;
    database.cut().await;
    for round in 0..2 {
        let started = Instant::now();
        let request = proto::loms::StocksRequest { sku: 7 };
        let mut grpc = app.grpc.clone();
        let (created, payed, stocks) = tokio::join!(
            app.try_create(order(1, &[(7, 1)], "k")),
            app.pay(id),
            grpc.stocks(request)
        );
        let statuses = [
            created.map(drop).unwrap_err(),
            payed.unwrap_err(),
            stocks.map(drop).unwrap_err(),
        ];
        for status in statuses {
            assert_eq!(
                status.code(),
                Code::Unavailable,
                "round {round}: {status:?}"
            );
            assert!(!status.message().contains("127.0.0.1"), "{status:?}");
        }
        assert!(
            started.elapsed() < Duration::from_secs(3),
            "{:?}",
            started.elapsed()
        );
    }
    let answer = app.post("/stocks", "{\"sku\":7}").await;
    assert_eq!((answer.status, &answer.json()["code"]), (503, &json!(14)));
    eventually("a report", async || {
        let ready = app.get("/readyz").await;
        ready.status == 503 && ready.json()["database"] == "away"
    })
    .await;
    database.open();
    // the first to try again may meet a connection that died; nobody has to restart anything
    let back = Instant::now();
    eventually("orders again", async || {
        app.try_create(order(1, &[(7, 1)], "k")).await.is_ok()
    })
    .await;
    eventually("payments again", async || app.pay(id).await.is_ok()).await;
    eventually("readiness again", async || {
        app.get("/readyz").await.status == 200
    })
    .await;
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await,
        2
    );
    app.finish().await;
}

//! The broker or the database away: what goes on, what is refused, and that everything is there afterwards.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{ConnectOptions as _, PgPool};
use tonic::Code;

use crate::{
    kafka, oracle,
    proxy::Proxy,
    test_app::{TestApp, eventually, order},
};

const WAITING: &str = "SELECT count(*) FROM loms.outbox";

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn orders_go_on_without_a_broker_and_events_follow(pool: PgPool) {
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

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn events_follow_when_the_topic_appears(pool: PgPool) {
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

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn without_the_database_callers_hear_unavailable_and_soon(pool: PgPool) {
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
    let ready = app.get("/readyz").await;
    assert_eq!(
        (ready.status, &ready.json()["database"]),
        (503, &json!("away"))
    );
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

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn the_workers_give_up_a_database_that_has_gone_silent(pool: PgPool) {
    let (database, connection_string) = database_behind_proxy(&pool);
    let postgres = json!({"connection_string": connection_string, "statement_timeout": "500ms"});
    let app = TestApp::start(&pool, json!({"postgres": postgres})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    // open connections that nothing comes through: no error will ever say so
    database.silence();
    let silent = Instant::now();
    let refused = app.try_create(order(1, &[(7, 1)], "k")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    eventually("an order after the silence", async || {
        app.try_create(order(1, &[(7, 1)], "k")).await.is_ok()
    })
    .await;
    assert!(
        silent.elapsed() < Duration::from_secs(4),
        "{:?}",
        silent.elapsed()
    );
    // the relay and the sweeper had connections of their own, as silent as this one
    eventually("a relay that goes on", async || {
        oracle::count(&pool, WAITING).await == 0
    })
    .await;
    sqlx::query("UPDATE loms.unpaid_order SET payment_deadline = now()")
        .execute(&pool)
        .await
        .unwrap();
    eventually("a sweeper that goes on", async || {
        oracle::count(&pool, "SELECT count(*) FROM loms.unpaid_order").await == 0
    })
    .await;
    app.finish().await;
}

fn database_behind_proxy(pool: &PgPool) -> (Proxy, String) {
    let options = pool.connect_options();
    let mut database = Proxy::closed(&format!("{}:{}", options.get_host(), options.get_port()));
    database.open();
    let through = (*options)
        .clone()
        .port(database.address.port())
        .host("127.0.0.1");
    (database, through.to_url_lossy().to_string())
}

//! The stop: what runs is finished, what cannot finish is left whole, and all of it within the grace.

use std::time::{Duration, Instant};

use serde_json::json;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    kafka, oracle,
    process::{self, Process},
    proxy::Proxy,
    test_app::{TestApp, eventually, lock_waiters},
};

#[tokio::test]
async fn a_call_in_progress_is_answered() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    let (one, other) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    let mut held = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.user_order FOR UPDATE")
        .execute(&mut *held)
        .await
        .unwrap();
    let stop = async {
        lock_waiters(&pool, 2).await;
        app.begin_stop();
        held.rollback().await.unwrap();
    };
    let cancel = app.post("/cancelOrder", json!({"orderID": other}).to_string());
    let (payed, cancelled, ()) = tokio::join!(app.pay(one), cancel, stop);
    payed.unwrap();
    assert_eq!(cancelled.status, 200);
    let topic = app.topic.clone();
    app.ended().await.unwrap();
    let ends = "SELECT count(*) FROM loms.user_order WHERE status IN ('payed', 'cancelled')";
    assert_eq!(oracle::count(&pool, ends).await, 2);
    // events that were still waiting leave with the next start
    TestApp::start(&pool, json!({"kafka": {"topic": topic}}))
        .await
        .finish()
        .await;
}

#[tokio::test]
async fn a_broker_that_is_away_does_not_hold_it_up() {
    let pool = crate::database().await;
    let mut broker = Proxy::closed(&kafka::brokers());
    let changes = json!({"brokers": [broker.address.to_string()], "shutdown_grace": "5s",
                         "outbox": {"broker_timeout": "60s"}});
    let app = TestApp::start(&pool, changes).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    let (topic, started) = (app.topic.clone(), Instant::now());
    app.stop().await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.outbox").await,
        2
    );
    broker.open();
    TestApp::start(&pool, json!({"kafka": {"topic": topic}}))
        .await
        .finish()
        .await;
}

#[tokio::test]
async fn a_caller_who_only_watches_does_not_hold_it_up() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"shutdown_grace": "3s"})).await;
    let request = HealthCheckRequest::default();
    let watch = HealthClient::new(app.channel.clone())
        .watch(request)
        .await
        .unwrap();
    let mut watch = watch.into_inner();
    assert!(watch.message().await.unwrap().is_some());
    let idle = tokio::net::TcpStream::connect(app.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let started = Instant::now();
    app.stop().await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
    drop((watch, idle));
}

/// Balancers need a moment to see that it is not ready: until then new connections and calls are
/// served as before.
#[tokio::test]
async fn new_calls_are_served_until_the_delay_is_over() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"shutdown_delay": "2s"})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.begin_stop();
    eventually("not ready", async || app.get("/readyz").await.status == 503).await;
    let began = Instant::now();
    let mut served = 0;
    while began.elapsed() < Duration::from_millis(1_200) {
        let order = app.create(1, &[(7, 1)]).await.order_id;
        app.pay(order).await.unwrap();
        let answer = app.post("/stocks", "{\"sku\":7}").await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["connection"], "close");
        let mut health = HealthClient::new(app.channel.clone());
        let health = health.check(HealthCheckRequest::default()).await.unwrap();
        assert_eq!(health.into_inner().status, 2, "NOT_SERVING");
        served += 1;
    }
    assert!(served > 0);
    let topic = app.topic.clone();
    app.ended().await.unwrap();
    TestApp::start(&pool, json!({"kafka": {"topic": topic}}))
        .await
        .finish()
        .await;
}

/// An operator who cannot wait ends the delay, and the stop is a clean one.
#[tokio::test]
async fn a_second_signal_ends_the_delay() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let config = process::config(&pool, &topic, &json!({"shutdown_delay": "60s"}));
    let mut process = Process::start(&config).await;
    let ready = format!("http://{}/readyz", process.http());
    let status = async || {
        let answer = reqwest::get(&ready).await;
        answer.map_or(0, |answer| answer.status().as_u16())
    };
    eventually("ready", async || status().await == 200).await;
    let began = Instant::now();
    process.signal("-TERM");
    eventually("not ready", async || status().await == 503).await;
    process.signal("-TERM");
    assert!(process.ended().await.success());
    assert!(began.elapsed() < Duration::from_secs(30));
}

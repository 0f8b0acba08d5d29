//! What is saved is told: each order's events in turn, none that fails in the way of others, every end with its reason.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    kafka::Kafka,
    telegram::{Answer, Telegram},
    test_app::{TestApp, count, eventually},
};

const KEY: &str = "123456:the-key";
const ALWAYS: u32 = u32::MAX;

/// Saves an untold message as the inbox does.
async fn save(pool: &PgPool, order: i64, sequence: i32, status: &str) {
    let statement = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
        VALUES (7, $1, $2, $3, 'order ' || $1 || ' is ' || $3, now(), 'orders', 0, $1 * 10 + $2)";
    let insert = sqlx::query(statement)
        .bind(order)
        .bind(sequence)
        .bind(status);
    insert.execute(pool).await.expect("saved");
}

fn through(telegram: &Telegram) -> Value {
    json!({"telegram": {"api_key": KEY, "chat_id": -100200, "api_url": telegram.url}})
}

async fn reason(pool: &PgPool, order: i64) -> (i32, String) {
    let statement = "SELECT attempts, give_up_reason FROM notifications.message
        WHERE order_id = $1 AND given_up_at IS NOT NULL";
    sqlx::query_as(statement)
        .bind(order)
        .fetch_one(pool)
        .await
        .expect("one given up")
}

async fn nothing_left(app: &TestApp) {
    eventually("every message has its end", || async {
        app.count("told_at IS NULL AND given_up_at IS NULL").await == 0
    })
    .await;
}

#[sqlx::test]
async fn an_order_is_told_in_turn_and_in_words(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for (sequence, status) in [(2, "awaiting payment"), (3, "payed"), (1, "new")] {
        save(&pool, 42, sequence, status).await;
    }
    let app = TestApp::start(&pool, &kafka, through(&telegram)).await;
    nothing_left(&app).await;
    let texts = telegram.texts();
    assert_eq!(
        texts,
        [
            "order 42 is new",
            "order 42 is awaiting payment",
            "order 42 is payed",
        ]
    );
    let call = telegram.calls().remove(0);
    assert_eq!(call.path, format!("bot{KEY}"));
    // plain text: no parse_mode, so there is nothing to escape
    assert_eq!(call.body, json!({"chat_id": "-100200", "text": texts[0]}));
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 1").await, 3);
    app.finish().await;
}

#[sqlx::test]
async fn a_429_pauses_the_whole_sender_and_is_no_attempt(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in [1, 2, 3] {
        save(&pool, order, 1, "new").await;
    }
    telegram.answer("order 1 ", Answer::RetryAfter(1), 2);
    let mut changes = through(&telegram);
    // with one attempt at most, one that counted would be given up
    changes["delivery"] = json!({"in_flight": 1, "max_attempts": 1});
    let app = TestApp::start(&pool, &kafka, changes).await;
    nothing_left(&app).await;
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 1").await, 3);
    let calls = telegram.calls();
    assert_eq!(calls.len(), 5);
    for pair in calls[..3].windows(2) {
        let pause = pair[1].at - pair[0].at;
        assert!(pause >= Duration::from_millis(900), "waited only {pause:?}");
    }
    app.finish().await;
}

#[sqlx::test]
async fn what_fails_by_itself_is_given_up_and_blocks_nobody(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=8 {
        save(&pool, order, 1, "new").await;
        save(&pool, order, 2, "failed").await;
    }
    telegram.answer("order 1 is new", Answer::Status(400), ALWAYS);
    telegram.answer("order 2 is new", Answer::Status(500), ALWAYS);
    telegram.answer(
        "order 3 is new",
        Answer::Slow(Duration::from_secs(30)),
        ALWAYS,
    );
    telegram.answer("order 4 is new", Answer::Status(502), 2);
    let app = TestApp::start(&pool, &kafka, through(&telegram)).await;
    let others = "order_id > 4 AND told_at IS NOT NULL";
    eventually("the other orders are told", || async {
        app.count(others).await == 8
    })
    .await;
    assert_eq!(
        app.count("order_id = 3 AND given_up_at IS NOT NULL").await,
        0,
        "while it is still tried"
    );
    nothing_left(&app).await;

    assert_eq!(
        reason(&pool, 1).await,
        (1, "HTTP 400 as the test says".to_owned())
    );
    let failed = "failed 3 times, last: HTTP 500 as the test says";
    assert_eq!(reason(&pool, 2).await, (3, failed.to_owned()));
    assert_eq!(
        reason(&pool, 3).await,
        (3, "failed 3 times, last: no answer in time".to_owned())
    );
    assert_eq!(
        app.count("order_id = 4 AND sequence = 1 AND told_at IS NOT NULL AND attempts = 3")
            .await,
        1
    );
    // an end, whichever, lets the order's next one go
    assert_eq!(app.count("sequence = 2 AND told_at IS NOT NULL").await, 8);
    app.finish().await;
}

#[sqlx::test]
async fn telegram_away_does_not_stop_the_start_and_keeps_the_key_to_itself(pool: PgPool) {
    let kafka = Kafka::new().await;
    save(&pool, 1, 1, "new").await;
    // a port that was just free, and nobody listens on
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("an address");
    let changes = json!({"telegram": {"api_key": KEY, "chat_id": "@shop", "api_url": format!("http://{free}")}});
    let app = TestApp::start(&pool, &kafka, changes).await;
    nothing_left(&app).await;
    let (attempts, reason) = reason(&pool, 1).await;
    assert_eq!(attempts, 3);
    assert!(reason.contains("refused"), "{reason}");
    assert!(!reason.contains("the-key"), "{reason}");
    app.finish().await;
}

#[sqlx::test]
async fn what_is_over_an_hour_old_is_not_told_any_more(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    save(&pool, 1, 1, "new").await;
    let age = "UPDATE notifications.message SET saved_at = now() - interval '61 minutes', attempts = 2, last_error = 'x'";
    sqlx::query(age).execute(&pool).await.expect("aged");
    save(&pool, 1, 2, "failed").await;
    let app = TestApp::start(&pool, &kafka, through(&telegram)).await;
    nothing_left(&app).await;
    assert_eq!(
        reason(&pool, 1).await,
        (2, "older than 3600 s after 2 attempts, last: x".to_owned())
    );
    assert_eq!(telegram.texts().len(), 1);
    app.finish().await;
}

#[sqlx::test]
async fn one_replica_sends_and_another_takes_over(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    let first = TestApp::start(&pool, &kafka, through(&telegram)).await;
    let second = TestApp::start(&pool, &kafka, through(&telegram)).await;
    for order in 1..=100 {
        save(&pool, order, 1, "new").await;
    }
    nothing_left(&first).await;
    assert_eq!(
        telegram.texts().len(),
        100,
        "told once each, though two could"
    );
    first.finish().await;
    save(&pool, 101, 1, "new").await;
    nothing_left(&second).await;
    assert_eq!(telegram.texts().len(), 101);
    second.finish().await;
    assert_eq!(count(&pool, "told_at IS NOT NULL").await, 101);
}

#[sqlx::test]
async fn a_lease_shorter_than_the_calls_under_it_is_refused(pool: PgPool) {
    let kafka = Kafka::new().await;
    let changes = json!({"delivery": {"lease": "1s"}, "telegram": {"timeout": "1s"}});
    let config = crate::test_app::config(&pool, &kafka, changes);
    let error = notifications::app::App::bind(config)
        .await
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("delivery.lease"), "{error}");
}

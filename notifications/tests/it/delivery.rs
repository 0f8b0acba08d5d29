//! What is saved is told: each order's events in turn, none that fails in the way of others, every end with its reason.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::AsyncReadExt as _;

use crate::{
    kafka::Kafka,
    process::{Replica, config_of},
    telegram::{Answer, Telegram},
    test_app::{TestApp, count, eventually},
};

const KEY: &str = "123456:the-key";
pub(crate) const ALWAYS: u32 = u32::MAX;
const TOO_LONG: &str = "Bad Request: message is too long";

/// Saves an untold message as the inbox does.
pub(crate) async fn save(pool: &PgPool, order: i64, sequence: i32, status: &str) {
    let statement = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
        VALUES (7, $1, $2, $3, 'order ' || $1 || ' is ' || $3, now(), 'orders', 0, $1 * 10 + $2)";
    let insert = sqlx::query(statement)
        .bind(order)
        .bind(sequence)
        .bind(status);
    insert.execute(pool).await.expect("saved");
}

pub(crate) fn through(telegram: &Telegram) -> Value {
    json!({"telegram": {"api_key": KEY, "chat_id": -100200, "api_url": telegram.url}})
}

pub(crate) async fn reason(pool: &PgPool, order: i64) -> (i32, String) {
    let statement = "SELECT attempts, give_up_reason FROM notifications.message
        WHERE order_id = $1 AND given_up_at IS NOT NULL";
    sqlx::query_as(statement)
        .bind(order)
        .fetch_one(pool)
        .await
        .expect("one given up")
}

pub(crate) async fn nothing_left(app: &TestApp) {
    eventually("every message has its end", || async {
        app.count("told_at IS NULL AND given_up_at IS NULL").await == 0
    })
    .await;
}

#[tokio::test]
async fn an_order_is_told_in_turn_and_in_words() {
    let pool = crate::database().await;
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
            "Order 42 of user 7 is new",
            "Order 42 of user 7 is awaiting payment",
            "Order 42 of user 7 is payed",
        ]
    );
    let call = telegram.calls().remove(0);
    assert_eq!(call.path, format!("bot{KEY}"));
    // plain text: no parse_mode, so there is nothing to escape
    let text = call.body["text"].as_str().expect("a text");
    assert_eq!(call.body, json!({"chat_id": "-100200", "text": text}));
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 1").await, 3);
    app.finish().await;
}

#[tokio::test]
async fn a_429_pauses_the_whole_sender_and_is_no_attempt() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in [1, 2, 3] {
        save(&pool, order, 1, "new").await;
    }
    telegram.answer("Order 1 ", Answer::RetryAfter(1), 2);
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

/// PostgreSQL takes no NUL: an error text of Telegram with one must not stop the writing of
/// results.
#[tokio::test]
async fn what_telegram_says_is_stored_without_what_cannot_be() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=3 {
        save(&pool, order, 1, "new").await;
    }
    const ODD: &str = "no\0 such\u{7f}\nchat";
    telegram.answer("Order 1 of user 7 is new", Answer::BadRequest(ODD), ALWAYS);
    let app = TestApp::start(&pool, &kafka, through(&telegram)).await;
    nothing_left(&app).await;
    let said = "failed 3 times, last: HTTP 400 no  such  chat";
    assert_eq!(reason(&pool, 1).await, (3, said.to_owned()));
    assert_eq!(app.count("order_id > 1 AND told_at IS NOT NULL").await, 2);
    app.finish().await;
}

#[tokio::test]
async fn what_fails_by_itself_is_given_up_and_blocks_nobody() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=8 {
        save(&pool, order, 1, "new").await;
        save(&pool, order, 2, "failed").await;
    }
    telegram.answer(
        "Order 1 of user 7 is new",
        Answer::BadRequest(TOO_LONG),
        ALWAYS,
    );
    telegram.answer("Order 2 of user 7 is new", Answer::Status(500), ALWAYS);
    telegram.answer(
        "Order 3 of user 7 is new",
        Answer::Slow(Duration::from_secs(30)),
        ALWAYS,
    );
    telegram.answer("Order 4 of user 7 is new", Answer::Status(502), 2);
    telegram.answer("Order 5 of user 7 is new", Answer::RetryAfter(1), 1);
    let late = Duration::from_millis(300);
    telegram.answer("Order 6 of user 7 is new", Answer::Slow(late), 1);
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

    assert_eq!(reason(&pool, 1).await, (1, format!("HTTP 400 {TOO_LONG}")));
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
    // late is not failed, and a pause is no attempt
    assert_eq!(
        app.count("order_id IN (5, 6) AND sequence = 1 AND told_at IS NOT NULL AND attempts = 1")
            .await,
        2
    );
    // an end, whichever, lets the order's next one go
    assert_eq!(app.count("sequence = 2 AND told_at IS NOT NULL").await, 8);
    app.finish().await;
}

#[tokio::test]
async fn a_chat_that_an_operator_mends_costs_no_message() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    save(&pool, 1, 1, "new").await;
    save(&pool, 2, 1, "new").await;
    let moved = "Bad Request: group chat was upgraded to a supergroup chat";
    telegram.answer("Order 1 ", Answer::BadRequest(moved), 2);
    let missing = "Bad Request: chat not found";
    telegram.answer("Order 2 ", Answer::BadRequest(missing), ALWAYS);
    let app = TestApp::start(&pool, &kafka, through(&telegram)).await;
    nothing_left(&app).await;
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 3").await, 1);
    let reason = reason(&pool, 2).await;
    let failed = format!("failed 3 times, last: HTTP 400 {missing}");
    assert_eq!(reason, (3, failed), "tried to the end, and kept why");
    app.finish().await;
}

#[tokio::test]
async fn what_follows_in_an_order_waits_with_what_failed() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for (order, sequence, status) in [(1, 1, "new"), (1, 2, "failed"), (2, 1, "new")] {
        save(&pool, order, sequence, status).await;
    }
    telegram.answer("Order 1 of user 7 is new", Answer::Status(500), 1);
    let mut changes = through(&telegram);
    changes["delivery"] = json!({"backoff": "10m", "lease": "3s"});
    let app = TestApp::start(&pool, &kafka, changes).await;
    // both out of the way of the next look at the queue, and only one of them tried
    let waiting = "order_id = 1 AND next_attempt_at > now() + interval '9 minutes'";
    eventually("both wait", || async { app.count(waiting).await == 2 }).await;
    assert_eq!(
        app.count("attempts = 1 AND last_error LIKE 'HTTP 500%' AND sequence = 1")
            .await,
        1
    );
    assert_eq!(
        app.count("sequence = 2 AND attempts = 0 AND last_error IS NULL")
            .await,
        1
    );
    eventually("the other order is told", || async {
        app.count("order_id = 2 AND told_at IS NOT NULL").await == 1
    })
    .await;
    let sooner = "UPDATE notifications.message SET next_attempt_at = now() WHERE order_id = 1";
    sqlx::query(sooner).execute(&pool).await.expect("due");
    nothing_left(&app).await;
    let texts = telegram.texts();
    assert_eq!(
        texts[texts.len() - 2..],
        ["Order 1 of user 7 is new", "Order 1 of user 7 is failed"]
    );
    app.finish().await;
}

#[tokio::test]
async fn telegram_away_does_not_stop_the_start_and_keeps_the_key_to_itself() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    // a port that was just free, and nobody listens on
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("an address");
    // and one where every call is taken and never answered
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let hangs_up = silent.local_addr().expect("an address");
    let mut answering = tokio::task::JoinSet::new();
    answering.spawn(async move {
        while let Ok((mut call, _)) = silent.accept().await {
            // read first: closed with unread bytes it would be a reset, which is another failure
            let _ = call.read(&mut [0; 4096]).await;
        }
    });
    for (order, address, says) in [(1, free, "refused"), (2, hangs_up, "closed before")] {
        save(&pool, order, 1, "new").await;
        let changes = json!({"telegram": {"api_key": KEY, "chat_id": "@shop", "api_url": format!("http://{address}")}});
        let app = TestApp::start(&pool, &kafka, changes).await;
        nothing_left(&app).await;
        let (attempts, reason) = reason(&pool, order).await;
        assert_eq!(attempts, 3);
        assert!(reason.contains(says), "{reason}");
        assert!(!reason.contains("the-key"), "{reason}");
        app.finish().await;
    }
}

#[tokio::test]
async fn what_is_over_an_hour_old_is_not_told_any_more() {
    let pool = crate::database().await;
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

#[tokio::test]
async fn one_replica_sends_and_another_takes_over() {
    let pool = crate::database().await;
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

#[tokio::test]
async fn a_standby_takes_over_from_a_sender_that_died() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    let lease = Duration::from_secs(3);
    let config = config_of(&pool, &kafka, through(&telegram));
    let first = Replica::start(&config);
    save(&pool, 1, 1, "new").await;
    eventually("the first sends", || async { telegram.count() == 1 }).await;
    let second = Replica::start(&config);
    eventually("the second is ready", || async {
        second.get("/readyz").await.0 == 200
    })
    .await;
    save(&pool, 2, 1, "new").await;
    eventually("the first still sends", || async { telegram.count() == 2 }).await;
    // killed before that, it leaves a message to be told twice, which `crashes` is about
    eventually("and writes it down", || async {
        count(&pool, "told_at IS NOT NULL").await == 2
    })
    .await;
    first.kill();
    let died = Instant::now();
    save(&pool, 3, 1, "new").await;
    eventually("the second sends", || async { telegram.count() == 3 }).await;
    let took = died.elapsed();
    // the lease lapses, the standby looks three times in one, and takes its time to start a transaction
    assert!(
        took < lease + lease / 3 + Duration::from_secs(2),
        "{took:?}"
    );
    eventually("it is written down", || async {
        count(&pool, "told_at IS NOT NULL").await == 3
    })
    .await;
    assert_eq!(
        telegram.texts(),
        [
            "Order 1 of user 7 is new",
            "Order 2 of user 7 is new",
            "Order 3 of user 7 is new"
        ]
    );
    second.stop();
}

#[tokio::test]
async fn without_a_key_the_log_is_told() {
    let pool = crate::database().await;
    let replica = Replica::start(&config_of(&pool, &Kafka::new().await, json!({})));
    save(&pool, 1, 1, "payed").await;
    eventually("it is told", || async {
        count(&pool, "told_at IS NOT NULL").await == 1
    })
    .await;
    let logged = replica.stop();
    let told: Vec<_> = logged
        .iter()
        .filter(|line| line["message"] == "told")
        .collect();
    assert_eq!(told.len(), 1, "{logged:#?}");
    let text = told[0]["message.text"].as_str().expect("a text");
    assert!(text.starts_with("Order 1 of user 7 is payed: "), "{text}");
}

#[tokio::test]
async fn a_lease_shorter_than_the_calls_under_it_is_refused() {
    let pool = crate::database().await;
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

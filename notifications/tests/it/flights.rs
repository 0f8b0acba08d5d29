//! Messages that are on their way at once, and what becomes of them when something goes wrong in between.

use std::time::Duration;

use serde_json::json;

use crate::{
    delivery::{ALWAYS, nothing_left, reason, save, through},
    kafka::{Kafka, event},
    process::{Replica, config_of},
    proxy::Proxy,
    telegram::{Answer, Telegram},
    test_app::{TestApp, count, eventually},
};

#[tokio::test]
async fn a_message_that_hangs_holds_nobody_up() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=20 {
        save(&pool, order, 1, "new").await;
        save(&pool, order, 2, "failed").await;
    }
    telegram.answer(
        "Order 1 of user 7 is new",
        Answer::Slow(Duration::from_secs(60)),
        1,
    );
    let mut changes = through(&telegram);
    changes["telegram"]["timeout"] = json!("5s");
    // one is left for all the others
    changes["delivery"] = json!({"in_flight": 2, "lease": "12s", "max_attempts": 1});
    let app = TestApp::start(&pool, &kafka, changes).await;
    eventually("the others are told", async || {
        app.count("order_id > 1 AND told_at IS NOT NULL").await == 38
    })
    .await;
    let hanging = "order_id = 1 AND attempts = 0 AND told_at IS NULL AND given_up_at IS NULL";
    assert_eq!(app.count(hanging).await, 2, "while it hangs");
    nothing_left(&app).await;
    let late = "failed 1 times, last: no answer in time";
    assert_eq!(reason(&pool, 1).await, (1, late.to_owned()));
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 1").await, 39);
    let mut texts = telegram.texts();
    texts.sort();
    texts.dedup();
    assert_eq!((texts.len(), telegram.count()), (40, 40), "each once");
    app.finish().await;
}

#[tokio::test]
async fn whoever_takes_over_waits_as_long_as_telegram_asked() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    telegram.answer("Order 1 ", Answer::RetryAfter(4), 1);
    save(&pool, 1, 1, "new").await;
    let first = TestApp::start(&pool, &kafka, through(&telegram)).await;
    eventually("the pause is written down", async || {
        let paused = "SELECT paused_until > now() FROM notifications.sender";
        sqlx::query_scalar::<_, bool>(paused)
            .fetch_one(&pool)
            .await
            .expect("the sender")
    })
    .await;
    // it gives the lease back, which the other asks for every second
    let second = TestApp::start(&pool, &kafka, through(&telegram)).await;
    first.finish().await;
    nothing_left(&second).await;
    let calls = telegram.calls();
    assert_eq!(calls.len(), 2);
    let pause = calls[1].at - calls[0].at;
    assert!(pause >= Duration::from_millis(3900), "only {pause:?}");
    second.finish().await;
}

#[tokio::test]
async fn what_comes_later_in_an_order_waits_with_what_failed() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    telegram.answer("Order 4 ", Answer::Status(500), ALWAYS);
    let mut changes = through(&telegram);
    changes["delivery"] = json!({"backoff": "10m", "longest_backoff": "10m"});
    let app = TestApp::start(&pool, &kafka, changes).await;
    let at = "2026-03-01T10:00:00Z";
    kafka.send(4, &event(7, 4, 1, "new", at)).await;
    eventually("the first one failed", async || {
        app.count("attempts = 1").await == 1
    })
    .await;
    kafka.send(4, &event(7, 4, 2, "failed", at)).await;
    // read after it, from the same partition
    kafka.send(8, &event(7, 8, 1, "new", at)).await;
    eventually("another order is told", async || {
        app.count("order_id = 8 AND told_at IS NOT NULL").await == 1
    })
    .await;
    let waiting = "order_id = 4 AND next_attempt_at > now() + interval '9 minutes'";
    assert_eq!(app.count(waiting).await, 2, "out of the way of every look");
    let sooner = "UPDATE notifications.message SET next_attempt_at = now()";
    telegram.answer("Order 4 ", Answer::Status(500), 0);
    sqlx::query(sooner).execute(&pool).await.expect("due");
    nothing_left(&app).await;
    let texts = telegram.texts();
    assert_eq!(
        texts[texts.len() - 2..],
        ["Order 4 of user 7 is new", "Order 4 of user 7 is failed"]
    );
    app.finish().await;
}

#[tokio::test]
async fn a_page_that_is_not_of_telegram_tells_nothing() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=3 {
        save(&pool, order, 1, "new").await;
    }
    telegram.answer("Order 1 ", Answer::Page, 2);
    telegram.answer("Order 2 ", Answer::Page, ALWAYS);
    // read to its end, it would be an answer that does not come in time
    telegram.answer("Order 3 ", Answer::EndlessPage, ALWAYS);
    let mut changes = through(&telegram);
    // a machine that is busy is late with a page, too
    changes["telegram"]["timeout"] = json!("5s");
    changes["delivery"] = json!({"lease": "12s"});
    let app = TestApp::start(&pool, &kafka, changes).await;
    nothing_left(&app).await;
    assert_eq!(app.count("told_at IS NOT NULL AND attempts = 3").await, 1);
    let failed = "failed 3 times, last: no answer of Telegram's: HTTP 200";
    for order in [2, 3] {
        assert_eq!(reason(&pool, order).await, (3, failed.to_owned()));
    }
    app.finish().await;
}

#[tokio::test]
async fn an_attempt_whose_commit_is_not_heard_of_counts_once() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    let proxy = Proxy::before(&pool);
    save(&pool, 1, 1, "new").await;
    save(&pool, 1, 2, "failed").await;
    telegram.answer("Order 1 ", Answer::Status(500), ALWAYS);
    let mut changes = through(&telegram);
    // a round with the silent connection is over in 1.5 s
    changes["postgres"] =
        json!({"connection_string": proxy.url(&pool), "statement_timeout": "500ms"});
    changes["delivery"] = json!({"backoff": "10m", "longest_backoff": "10m"});
    proxy.lose_commit();
    let config = config_of(&pool, &kafka, changes);
    // its database is behind a proxy that runs on this thread
    let replica = tokio::task::spawn_blocking(move || Replica::start(&config));
    let replica = replica.await.expect("started");
    let failed = r#"notifications_counter_deliveries_total{outcome="failed"}"#;
    eventually("it is written down again, and heard of", async || {
        replica.metrics(failed).await.values().sum::<f64>() >= 1.0
    })
    .await;
    assert!(!proxy.will_lose_commit(), "a commit was lost");
    assert_eq!(telegram.count(), 1);
    let once = "attempts = 1 AND last_error LIKE 'HTTP 500%' AND sequence = 1";
    assert_eq!(count(&pool, once).await, 1);
    let waiting = "next_attempt_at > now() + interval '9 minutes'";
    assert_eq!(count(&pool, waiting).await, 2);
    replica.kill();
}

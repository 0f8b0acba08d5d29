//! Messages that are on their way at once, and what becomes of them when something goes wrong in between.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;

use crate::{
    delivery::{nothing_left, reason, save, through},
    kafka::Kafka,
    telegram::{Answer, Telegram},
    test_app::{TestApp, eventually},
};

#[sqlx::test]
async fn a_message_that_hangs_holds_nobody_up(pool: PgPool) {
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for order in 1..=20 {
        save(&pool, order, 1, "new").await;
        save(&pool, order, 2, "failed").await;
    }
    telegram.answer("order 1 is new", Answer::Slow(Duration::from_secs(60)), 1);
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

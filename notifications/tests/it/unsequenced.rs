//! Events of publishers that know no `Sequence`: each is known by its order, user and status,
//! wherever it lies and whoever sends it again.

use serde_json::json;
use sqlx::PgPool;

use crate::{
    kafka::{Kafka, event, header},
    process::{config_of, run},
    telegram::Telegram,
    test_app::{TestApp, eventually},
};

const AT: &str = "2026-03-01T10:00:00Z";
const STATUSES: [&str; 3] = ["new", "awaiting payment", "payed"];

/// An event as an old publisher writes it: one text for all that happens.
fn unsequenced(user: i64, order: i64, status: &str) -> String {
    format!(
        r#"{{"UserID":{user},"OrderID":{order},"Status":"{status}","Message":"order is created"}}"#
    )
}

/// What happens to four orders of one partition.
fn flow() -> Vec<(i64, String)> {
    let orders = [4, 8, 12, 16];
    let of = |order: i64| STATUSES.map(|status| (order, unsequenced(7, order, status)));
    orders.into_iter().flat_map(of).collect()
}

/// Runs the service until it has read the partition up to `end`.
async fn consume_to(pool: &PgPool, kafka: &Kafka, end: i64) {
    let app = TestApp::start(pool, kafka, json!({})).await;
    eventually("the partition is read", async || {
        kafka.committed(0) == Some(end)
    })
    .await;
    let unmoved = "SELECT count(*) FROM notifications.dead_letter WHERE moved_at IS NULL";
    eventually("its letters are in their topic", async || {
        let unmoved = sqlx::query_scalar(unmoved).fetch_one(pool).await;
        unmoved.is_ok_and(|unmoved: i64| unmoved == 0)
    })
    .await;
    app.finish().await;
}

/// `(user, status, sequence, superseded)` of an order's rows, in its order.
async fn rows(pool: &PgPool, order: i64) -> Vec<(i64, String, i32, Option<bool>)> {
    let rows = "SELECT user_id, status, sequence, superseded FROM notifications.message
        WHERE order_id = $1 ORDER BY notifications.place(sequence, status), id";
    let rows = sqlx::query_as(rows).bind(order).fetch_all(pool).await;
    rows.expect("rows")
}

fn row(user: i64, status: &str, sequence: i32) -> (i64, String, i32, Option<bool>) {
    (user, status.to_owned(), sequence, Some(false))
}

async fn count(pool: &PgPool) -> i64 {
    crate::test_app::count(pool, "true").await
}

#[tokio::test]
async fn a_broker_that_was_rebuilt_brings_the_same_events_and_new_ones_to_known_places() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    kafka.send_all(&flow()).await;
    consume_to(&pool, &kafka, 12).await;
    assert_eq!(count(&pool).await, 12);

    // whoever restores the topic does not restore its order
    let kafka = kafka.rebuilt().await;
    let mut again = flow();
    again.reverse();
    again.insert(0, (20, unsequenced(7, 20, "new")));
    again.push((20, unsequenced(7, 20, "failed")));
    kafka.send_all(&again).await;
    consume_to(&pool, &kafka, 14).await;
    assert_eq!(count(&pool).await, 14, "only order 20 is new");
    assert_eq!(
        rows(&pool, 20).await,
        [row(7, "new", 0), row(7, "failed", 0)]
    );
    assert!(kafka.dead_letters(0).is_empty());
}

#[tokio::test]
async fn a_letter_that_is_put_back_is_known_by_what_it_says() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    kafka.send(4, &unsequenced(7, 4, "new")).await;
    kafka.send(4, &unsequenced(8, 4, "new")).await;
    consume_to(&pool, &kafka, 2).await;
    let letter = kafka.dead_letters(1).remove(0);
    assert_eq!(
        header(&letter, "dead_letter.cause").as_deref(),
        Some("conflict")
    );
    let error = header(&letter, "dead_letter.error").expect("an error");
    assert_eq!(error, "order 4 is of user 7 already");

    let replay = || run(&config, &["dead-letters", "replay"]);
    assert_eq!(replay(), "1 dead letters put back\n");
    consume_to(&pool, &kafka, 3).await;
    assert_eq!(kafka.dead_letters(2).len(), 2, "still a conflict");
    let mend = "DELETE FROM notifications.message WHERE order_id = 4";
    sqlx::query(mend).execute(&pool).await.expect("mended");
    assert_eq!(replay(), "1 dead letters put back\n");
    kafka.send(4, &unsequenced(8, 4, "new")).await;
    consume_to(&pool, &kafka, 5).await;
    assert_eq!(rows(&pool, 4).await, [row(8, "new", 0)]);
    kafka.dead_letters(2);
}

#[tokio::test]
async fn with_a_sequence_or_without_it_is_the_same_event() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    // each comes both ways: in one batch, in another, the one first and the other
    let events = [
        unsequenced(7, 4, "new"),
        event(7, 4, 1, "new", AT),
        event(7, 4, 2, "awaiting payment", AT),
        unsequenced(7, 4, "awaiting payment"),
        unsequenced(7, 4, "payed"),
        unsequenced(7, 4, "payed"),
        // of another user: with a place that is taken, with one that is not, without
        event(8, 4, 2, "awaiting payment", AT),
        event(8, 4, 3, "payed", AT),
        unsequenced(8, 4, "cancelled"),
        // two users at once for an order that nobody knows: the first has it
        unsequenced(7, 8, "new"),
        unsequenced(8, 8, "awaiting payment"),
    ];
    for event in &events {
        kafka.send(4, event).await;
    }
    consume_to(&pool, &kafka, 11).await;
    let expected = [
        row(7, "new", 0),
        row(7, "awaiting payment", 0),
        row(7, "payed", 0),
    ];
    let found = rows(&pool, 4).await;
    let without_sequence: Vec<_> = found
        .iter()
        .map(|(user, status, _, counts)| (*user, status.clone(), 0, *counts))
        .collect();
    assert_eq!(without_sequence, expected, "{found:?}");
    assert_eq!(rows(&pool, 8).await, [row(7, "new", 0)]);
    let causes: Vec<_> = kafka
        .dead_letters(4)
        .iter()
        .map(|letter| header(letter, "dead_letter.cause").expect("a cause"))
        .collect();
    assert_eq!(causes, ["conflict"; 4]);

    for event in events.iter().rev() {
        kafka.send(4, event).await;
    }
    consume_to(&pool, &kafka, 22).await;
    assert_eq!(rows(&pool, 4).await, found);
    assert_eq!(rows(&pool, 8).await, [row(7, "new", 0)]);
    kafka.dead_letters(8);
}

#[tokio::test]
async fn they_are_told_in_the_order_of_their_statuses() {
    let pool = crate::database().await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    for (order, last) in [(4, "payed"), (8, "cancelled")] {
        for status in [last, "awaiting payment", "new"] {
            kafka.send(order, &unsequenced(7, order, status)).await;
        }
    }
    // nothing is told before all are saved
    let postponed = "ALTER TABLE notifications.sender ADD CONSTRAINT held CHECK (holder IS NULL)";
    let admin = testkit::admin(&pool).await;
    sqlx::query(postponed).execute(&admin).await.expect("held");
    let changes = json!({
        "telegram": {"api_key": "123456:the-key", "chat_id": "1", "api_url": telegram.url},
        "delivery": {"in_flight": 1},
    });
    let app = TestApp::start(&pool, &kafka, changes).await;
    eventually("all are saved", async || app.count("true").await == 6).await;
    let go_on = "ALTER TABLE notifications.sender DROP CONSTRAINT held";
    sqlx::query(go_on).execute(&admin).await.expect("let go");
    eventually("all are told", async || {
        app.count("told_at IS NULL").await == 0
    })
    .await;
    let texts = telegram.texts();
    for (order, last) in [(4, "payed"), (8, "cancelled")] {
        let begins = format!("Order {order} of user 7 is ");
        let told: Vec<_> = texts
            .iter()
            .filter_map(|text| text.strip_prefix(&begins))
            .collect();
        assert_eq!(told, ["new", "awaiting payment", last]);
    }
    app.finish().await;
}

/// How the release before saves an event without a sequence.
const OLD_INSERT: &str = "INSERT INTO notifications.message
    (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
    VALUES ($1, $2, $3, $4, 'order is created', now(), 'orders', 0, $5) ON CONFLICT DO NOTHING RETURNING id";

async fn insert_as_before(pool: &PgPool, order: i64, sequence: i32, status: &str, offset: i64) {
    let saved = sqlx::query(OLD_INSERT)
        .bind(7_i64)
        .bind(order)
        .bind(sequence)
        .bind(status)
        .bind(offset)
        .fetch_optional(pool)
        .await
        .expect("saved");
    assert!(saved.is_some(), "{order} {status}: it would try for ever");
}

#[tokio::test]
async fn migrate_marks_what_is_there_twice_and_the_release_before_goes_on() {
    let pool = testkit::empty_database("notifications").await;
    let kafka = Kafka::new().await;
    let before = notifications::app::MIGRATOR.run_to(3, &pool).await;
    before.expect("the schema of the release before");
    for (offset, (sequence, status)) in [
        (0, "new"),
        (1, "new"),
        (0, "new"),
        (0, "payed"),
        (0, "payed"),
        (2, "awaiting payment"),
    ]
    .into_iter()
    .enumerate()
    {
        insert_as_before(&pool, 4, sequence, status, offset as i64).await;
    }
    // the second `payed` was told, the first was not
    let told = "UPDATE notifications.message SET told_at = now() WHERE source_offset = 4";
    sqlx::query(told).execute(&pool).await.expect("told");
    let config = config_of(&pool, &kafka, json!({}));
    assert_eq!(run(&config, &["migrate"]), "");

    let marked =
        "SELECT concat_ws(' ', source_offset, superseded, told_at IS NOT NULL, give_up_reason)
        FROM notifications.message ORDER BY source_offset";
    let marked: Vec<String> = sqlx::query_scalar(marked)
        .fetch_all(&pool)
        .await
        .expect("rows");
    let expected = [
        "0 t f superseded",
        "1 f f",
        "2 t f superseded",
        "3 t f superseded",
        "4 f t",
        "5 f f",
    ];
    assert_eq!(marked, expected);

    // beside the new one the release before is refused nothing that it would have saved, and what
    // it saves is known
    insert_as_before(&pool, 4, 0, "new", 6).await;
    insert_as_before(&pool, 8, 0, "new", 7).await;
    kafka.send(4, &unsequenced(7, 4, "new")).await;
    kafka.send(8, &unsequenced(7, 8, "new")).await;
    kafka.send(8, &event(7, 8, 1, "new", AT)).await;
    kafka.send(8, &unsequenced(8, 8, "payed")).await;
    consume_to(&pool, &kafka, 4).await;
    assert_eq!(count(&pool).await, 8);
    kafka.dead_letters(1);
}

//! Replicas that come and go: they share the partitions, and whatever is in hand then, nothing is lost or saved twice.

use std::ops::Range;

use serde_json::json;

use crate::{
    kafka::{Kafka, PARTITIONS, event},
    process::{Replica, config_of},
    test_app::{count, eventually},
};

const STATUSES: [&str; 3] = ["new", "awaiting payment", "cancelled"];
const HALF: i64 = PARTITIONS as i64 / 2;

/// Three events of each order.
async fn send(kafka: &Kafka, orders: Range<i64>) {
    for order in orders {
        for (sequence, status) in (1..).zip(STATUSES) {
            let event = event(7, order, sequence, status, "2026-03-01T10:00:00Z");
            kafka.send(order, &event).await;
        }
    }
}

#[tokio::test]
async fn two_start_one_is_killed_one_joins() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    let share = async |one: &Replica, other: &Replica| {
        eventually("they share", async || {
            one.partitions().await == HALF && other.partitions().await == HALF
        })
        .await;
    };
    // events flow through every change
    let (first, second) = (Replica::start(&config), Replica::start(&config));
    tokio::join!(share(&first, &second), send(&kafka, 1..200));
    send(&kafka, 200..250).await;
    first.kill();
    let alone = eventually("the second has all", async || {
        second.partitions().await == i64::from(PARTITIONS)
    });
    tokio::join!(alone, send(&kafka, 250..300));
    let third = Replica::start(&config);
    tokio::join!(share(&second, &third), send(&kafka, 300..350));
    send(&kafka, 350..400).await;

    let all = async || count(&pool, "true").await == 399 * 3;
    eventually("every event is saved", all).await;
    eventually("every message is told", async || {
        count(&pool, "told_at IS NULL").await == 0
    })
    .await;
    let distinct = "SELECT count(DISTINCT (order_id, sequence)) FROM notifications.message";
    let distinct: i64 = sqlx::query_scalar(distinct)
        .fetch_one(&pool)
        .await
        .expect("a count");
    assert_eq!(distinct, 399 * 3, "saved twice");
    assert!(kafka.dead_letters(0).is_empty());
    second.stop();
    third.stop();
}

#[tokio::test]
async fn what_is_in_hand_is_abandoned_when_its_partition_goes() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(
        &pool,
        &kafka,
        json!({"postgres": {"lock_timeout": "100ms"}}),
    );
    let first = Replica::start(&config);
    send(&kafka, 1..2).await;
    eventually("the first consumes", async || {
        count(&pool, "true").await == 3
    })
    .await;
    // the first has events of every partition in hand, and cannot save them
    let mut outage = pool.begin().await.expect("a transaction");
    let lock = "LOCK TABLE notifications.message IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock)
        .execute(&mut *outage)
        .await
        .expect("locked");
    send(&kafka, 2..50).await;
    let second = Replica::start(&config);
    eventually("they share all the same", async || {
        first.partitions().await == HALF && second.partitions().await == HALF
    })
    .await;
    outage.rollback().await.expect("the server is back");

    let all = async || count(&pool, "true").await == 49 * 3;
    eventually("every event is saved", all).await;
    eventually("all is committed", async || {
        kafka.offsets().committed().values().sum::<i64>() == 49 * 3
    })
    .await;
    let mut saved = 0.0;
    for replica in [&first, &second] {
        let by = replica.metrics("notifications_counter_saved_total").await;
        let by: f64 = by.values().sum();
        assert!(by > 3.0, "each saved what is its own now, {by}");
        saved += by;
        let twice = replica
            .metrics("notifications_counter_duplicates_total")
            .await;
        assert_eq!(
            twice.values().sum::<f64>(),
            0.0,
            "nobody kept what was not his any more"
        );
    }
    assert_eq!(saved, 49.0 * 3.0);
    first.stop();
    second.stop();
}

//! A database that is away, silent, or slow for want of statistics: consumption waits and goes on, nothing is dead-lettered
//! that is no poison.

use serde_json::json;
use sqlx::PgPool;
use tonic::Code;

use crate::{
    dead_letters::unmoved,
    kafka::{Kafka, PARTITIONS, event},
    process::{Replica, config_of},
    proxy::Proxy,
    test_app::{TestApp, count, eventually, request},
};

const AT: &str = "2026-03-01T10:00:00Z";
/// Enough that to try each by itself takes seconds.
const POISON: usize = 4000;

#[tokio::test]
async fn a_database_that_is_away_is_waited_for() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let app = TestApp::start(
        &pool,
        &kafka,
        json!({"postgres": {"lock_timeout": "100ms"}}),
    )
    .await;
    kafka
        .send(8, &event(7, 8, 1, "new", "2026-03-01T10:00:00Z"))
        .await;
    eventually("the consumer has joined", || async {
        app.count("true").await == 1
    })
    .await;

    // every statement of the service now runs into its own time-out, as with a server that does not answer
    let mut outage = pool.begin().await.expect("a transaction");
    let lock = "LOCK TABLE notifications.message IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock)
        .execute(&mut *outage)
        .await
        .expect("locked");
    let waiting = async || {
        let statement =
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database()
            AND wait_event_type = 'Lock' AND query LIKE '%taken.user_id%notifications.message%'";
        sqlx::query_scalar::<_, bool>(statement)
            .fetch_one(&pool)
            .await
            .expect("an answer")
    };
    let mut last = (0, 0);
    for (sequence, status) in [(2, "awaiting payment"), (3, "payed")] {
        last = kafka
            .send(8, &event(7, 8, sequence, status, "2026-03-01T10:00:00Z"))
            .await;
        eventually("it tries to save", &waiting).await;
        eventually("it gives up for now", async || !waiting().await).await;
    }
    eventually("it tries again", &waiting).await;
    assert_eq!(
        kafka.committed(last.0),
        Some(last.1 - 1),
        "nothing is committed that is not saved"
    );
    outage.rollback().await.expect("the server is back");

    eventually("consumption goes on", || async {
        kafka.committed(last.0) == Some(last.1 + 1)
    })
    .await;
    // whoever is the first to ask on a connection that has gone silent is told UNAVAILABLE
    eventually("callers are served again", async || {
        let asked = request(7, (2026, 3, 1), (2026, 3, 1));
        let answer = app.grpc.clone().get_history_with_period(asked).await;
        answer.is_ok()
    })
    .await;
    let statuses = ["new", "awaiting payment", "payed"].map(|status| (8, status.to_owned()));
    assert_eq!(app.statuses(7).await, statuses);
    assert!(kafka.dead_letters(0).is_empty());
    app.finish().await;
}

#[tokio::test]
async fn a_connection_that_is_cut_or_goes_silent_is_an_outage_too() {
    let pool = crate::database().await;
    let (kafka, mut proxy) = (Kafka::new().await, Proxy::before(&pool));
    // what is silent is given up a second after the longest statement
    let postgres = json!({"connection_string": proxy.url(&pool), "statement_timeout": "500ms"});
    let app = TestApp::start(&pool, &kafka, json!({"postgres": postgres})).await;
    kafka.send(8, &event(7, 8, 1, "new", AT)).await;
    eventually("the consumer has joined", async || {
        app.count("true").await == 1
    })
    .await;

    proxy.cut().await;
    let (partition, second) = kafka.send(8, &event(7, 8, 2, "awaiting payment", AT)).await;
    let asked = app
        .grpc
        .clone()
        .get_history_with_period(request(7, (2026, 3, 1), (2026, 3, 1)))
        .await;
    assert_eq!(asked.expect_err("no database").code(), Code::Unavailable);
    assert_ne!(kafka.committed(partition), Some(second + 1));
    proxy.open();
    eventually("consumption goes on", async || {
        kafka.committed(partition) == Some(second + 1)
    })
    .await;

    proxy.silence();
    let (_, third) = kafka.send(8, &event(7, 8, 3, "payed", AT)).await;
    eventually("consumption goes on", async || {
        kafka.committed(partition) == Some(third + 1)
    })
    .await;
    // whoever is the first to ask on a connection that has gone silent is told UNAVAILABLE
    eventually("callers are served again", async || {
        let asked = request(7, (2026, 3, 1), (2026, 3, 1));
        let answer = app.grpc.clone().get_history_with_period(asked).await;
        answer.is_ok()
    })
    .await;
    let statuses = ["new", "awaiting payment", "payed"].map(|status| (8, status.to_owned()));
    assert_eq!(app.statuses(7).await, statuses);
    assert!(kafka.dead_letters(0).is_empty());
    app.finish().await;
}

#[tokio::test]
async fn the_lag_grows_while_the_database_is_away() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let mut outage = pool.begin().await.expect("a transaction");
    let lock = "LOCK TABLE notifications.message IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock)
        .execute(&mut *outage)
        .await
        .expect("locked");
    // nothing was ever committed, and while it is paused the consumer fetches nothing
    let replica = Replica::start(&config_of(
        &pool,
        &kafka,
        json!({"postgres": {"lock_timeout": "100ms"}}),
    ));
    let lag = async || {
        let lag = replica.metrics("notifications_consumer_lag").await;
        (lag.len(), lag.values().sum::<f64>())
    };
    let send = async |orders: std::ops::Range<i64>| {
        let events: Vec<_> = orders
            .map(|order| (order, event(7, order, 1, "new", AT)))
            .collect();
        kafka.send_all(&events).await;
    };
    let partitions = PARTITIONS as usize;
    send(1..41).await;
    eventually("it shows", async || lag().await == (partitions, 40.0)).await;
    send(41..101).await;
    eventually("it grows", async || lag().await == (partitions, 100.0)).await;
    outage.rollback().await.expect("the server is back");
    eventually("it is gone", async || lag().await == (partitions, 0.0)).await;
    assert_eq!(count(&pool, "true").await, 100);
    replica.stop();
}

/// Refused one by one, it takes longer than a round with the database may, and comes to its end all the same.
#[tokio::test]
async fn a_batch_of_poison_that_outlasts_a_round_blocks_nobody() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let poison = r#"{"UserId":7,"OrderID":4,"Status":"payed","Message":"\u0000"}"#;
    kafka.send(4, &event(7, 4, 1, "new", AT)).await;
    kafka.send_all(&vec![(4, poison.to_owned()); POISON]).await;
    let (partition, last) = kafka.send(4, &event(7, 4, 2, "failed", AT)).await;

    // a round is at most a second longer than a statement
    let changes = json!({"inbox": {"batch": POISON}, "postgres": {"statement_timeout": "500ms"}});
    let app = TestApp::start(&pool, &kafka, changes).await;
    eventually("the partition went on", async || {
        kafka.committed(partition) == Some(last + 1)
    })
    .await;
    let statuses = ["new", "failed"].map(|status| (4, status.to_owned()));
    assert_eq!(app.statuses(7).await, statuses);
    eventually("the topic has the letters", async || {
        unmoved(&pool).await == 0
    })
    .await;
    kafka.dead_letters(POISON);
    app.finish().await;
}

/// Statistics of a table are from when it was last looked at. What was not there then must not slow down what is known.
#[tokio::test]
async fn events_without_a_sequence_are_recognised_whatever_the_statistics_say() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    analyze_empty(&pool).await;
    // half of them by the release before, which has saved one of them very often
    let rows = "INSERT INTO notifications.message (user_id, order_id, sequence, status, message, created_at,
            source_topic, source_partition, source_offset, told_at, superseded)
        SELECT 7, CASE WHEN i < 25000 THEN 4 * i + 8 ELSE 4 END, 0, 'new', 'order is created', now(),
            $1, 0, i, now(), CASE WHEN i < 25000 THEN false END FROM generate_series(0, 49999) AS i";
    let rows = sqlx::query(rows).bind(&kafka.topic);
    rows.execute(&pool).await.expect("read before");
    let again = |user: i64, order: i64| {
        let event = format!(r#"{{"UserID":{user},"OrderID":{order},"Status":"new"}}"#);
        (order, event)
    };
    let known = (0..400).map(|number| again(7, 4 * number + 4));
    // nobody knows these, so every row of the user is as good a candidate
    let fresh = (0..100).map(|number| again(7, 1_000_000 + 4 * number));
    kafka
        .send_all(&known.chain(fresh).collect::<Vec<_>>())
        .await;

    let app = TestApp::start(
        &pool,
        &kafka,
        json!({"postgres": {"statement_timeout": "1s"}}),
    )
    .await;
    eventually("all are read", async || kafka.committed(0) == Some(500)).await;
    assert_eq!(app.count("true").await, 50_100);
    assert!(kafka.dead_letters(0).is_empty());
    app.finish().await;
}

#[tokio::test]
async fn a_long_queue_is_worked_off_whatever_the_statistics_say() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    analyze_empty(&pool).await;
    let rows = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
        SELECT 7, i, 1, 'new', 'order ' || i || ' is new', now(), 'orders', 0, i FROM generate_series(1, 50000) AS i";
    sqlx::query(rows).execute(&pool).await.expect("untold");

    let app = TestApp::start(
        &pool,
        &kafka,
        json!({"postgres": {"statement_timeout": "1s"}}),
    )
    .await;
    eventually("the sender works", async || {
        app.count("told_at IS NOT NULL").await >= 2000
    })
    .await;
    app.finish().await;
}

/// The usual state: many rows, and none of them was to be told when PostgreSQL last looked.
async fn analyze_empty(pool: &PgPool) {
    for statement in [
        "ALTER TABLE notifications.message SET (autovacuum_enabled = false)",
        "INSERT INTO notifications.message
         (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset, told_at)
         SELECT 8, 1000000 + i, 1, 'new', 'told', now(), 'orders', 1, i, now() FROM generate_series(1, 1000) AS i",
        "VACUUM ANALYZE notifications.message",
        "DELETE FROM notifications.message",
    ] {
        sqlx::query(statement).execute(pool).await.expect(statement);
    }
}

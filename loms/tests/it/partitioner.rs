//! How an order's partition is chosen: written down, changed only while nothing waits, and by all
//! relays together.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    kafka, oracle,
    process::{self, run},
    test_app::{TestApp, eventually},
};

const NOWHERE: &str = "127.0.0.1:1";
const WAITING: &str = "SELECT count(*) FROM loms.outbox";

fn with(partitioner: &str, topic: &str) -> Value {
    json!({"kafka": {"topic": topic, "partitioner": partitioner}})
}

async fn written(pool: &PgPool) -> Option<String> {
    let written = "SELECT partitioner FROM loms.relay";
    let written = sqlx::query_scalar(written).fetch_one(pool).await;
    written.expect("one row")
}

/// Where Sarama puts an order in the topics of these tests, which have 4 partitions: a third of 12.
fn of_sarama() -> BTreeMap<String, i32> {
    let rows = include_str!("../../src/outbox/sarama_partitions.csv").lines();
    let of = |row: &str| {
        let mut columns = row.split(',');
        let key = columns.next().expect("a key").to_owned();
        let of_12: i32 = columns.next().expect("12").parse().expect("a partition");
        (key, of_12 % 4)
    };
    rows.skip(1).map(of).collect()
}

#[tokio::test]
async fn another_partitioner_is_refused_while_events_wait() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let mut away = with("consistent_random", &topic);
    away["brokers"] = json!([NOWHERE]);
    let app = TestApp::start(&pool, away).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    app.stop().await.unwrap();
    assert_eq!(written(&pool).await.as_deref(), Some("consistent_random"));
    assert_eq!(oracle::count(&pool, WAITING).await, 2);

    let changed = with("fnv1a_random", &topic);
    let config = process::config(&pool, &topic, &changed);
    let refused = run(&config, &["serve"]).await;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(64), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains("kafka.partitioner was consistent_random and is fnv1a_random"),
        "{said}"
    );

    // as it was, until nothing waits; then the other one
    let app = TestApp::start(&pool, with("consistent_random", &topic)).await;
    eventually("an empty outbox", async || {
        oracle::count(&pool, WAITING).await == 0
    })
    .await;
    app.stop().await.unwrap();
    let app = TestApp::start(&pool, changed).await;
    assert_eq!(written(&pool).await.as_deref(), Some("fnv1a_random"));
    for _ in 0..20 {
        app.create(1, &[(7, 1)]).await;
    }
    eventually("an empty outbox", async || {
        oracle::count(&pool, WAITING).await == 0
    })
    .await;
    let sarama = of_sarama();
    let events = kafka::read_log(&topic).await;
    let after: Vec<_> = events.iter().filter(|event| event.key != "1").collect();
    assert_eq!(after.len(), 40);
    for event in after {
        assert_eq!(event.partition, sarama[&event.key], "{}", event.key);
    }
    app.stop().await.unwrap();
}

/// The system before has sent with Sarama's; what the import decides is sent with the same.
#[tokio::test]
async fn after_an_import_the_first_start_chooses() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let app = TestApp::start(&pool, json!({"brokers": [NOWHERE]})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    app.stop().await.unwrap();
    // as an import leaves it
    oracle::run(&pool, "UPDATE loms.relay SET partitioner = NULL").await;
    oracle::run(&pool, "INSERT INTO loms.import (state) VALUES ('done')").await;
    let app = TestApp::start(&pool, with("fnv1a_random", &topic)).await;
    assert_eq!(written(&pool).await.as_deref(), Some("fnv1a_random"));
    app.finish().await;
    let sarama = of_sarama();
    for event in kafka::read_log(&topic).await {
        assert_eq!(event.partition, sarama[&event.key], "{}", event.key);
    }
}

/// A replica whose configuration was forgotten must not send beside the others.
#[tokio::test]
async fn a_relay_with_another_partitioner_than_is_written_sends_nothing() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    eventually("an empty outbox", async || {
        oracle::count(&pool, WAITING).await == 0
    })
    .await;
    oracle::run(&pool, "UPDATE loms.relay SET partitioner = 'fnv1a_random'").await;
    app.create(1, &[(7, 1)]).await;
    let looked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND application_name = 'loms-relay' AND query_start > now() - interval '40 ms'";
    for _ in 0..3 {
        eventually("a look at the outbox", async || {
            oracle::count(&pool, looked).await == 1
        })
        .await;
    }
    assert_eq!(oracle::count(&pool, WAITING).await, 2);
    oracle::run(&pool, "UPDATE loms.relay SET partitioner = NULL").await;
    app.finish().await;
}

/// A database that was away at the start is asked before anything is sent.
#[tokio::test]
async fn a_change_that_is_found_later_ends_the_process() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"brokers": [NOWHERE]})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    app.stop().await.unwrap();
    let mut outage = pool.begin().await.unwrap();
    let lock = "LOCK TABLE loms.relay IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock).execute(&mut *outage).await.unwrap();
    let changes = json!({"kafka": {"partitioner": "fnv1a_random"}});
    let app = TestApp::start(&pool, changes).await;
    outage.rollback().await.unwrap();
    let ended = format!("{:#}", app.ended().await.unwrap_err());
    assert!(ended.contains("kafka.partitioner was"), "{ended}");
    assert_eq!(oracle::count(&pool, WAITING).await, 2);
}

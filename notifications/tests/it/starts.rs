//! Where reading begins: as `kafka.start` says, once; after that nothing is skipped, whatever
//! became of the offsets.

use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;

use crate::{
    kafka::{Kafka, PARTITIONS, event},
    process::{Replica, config_of, refused},
    test_app::{TestApp, count, eventually},
};

const AT: &str = "2026-03-01T10:00:00Z";
const LOST: &str = "notifications_counter_offsets_lost_total";

/// Two orders of the first partition, one of the second.
async fn send_old(kafka: &Kafka) {
    for order in [4, 8, 1] {
        kafka.send(order, &event(7, order, 1, "new", AT)).await;
    }
}

/// `(offset, chosen_by)` of the partitions in their order, of those that have begun.
async fn starts(pool: &PgPool) -> Vec<(i64, String)> {
    let starts = "SELECT \"offset\", chosen_by FROM notifications.topic_start
        WHERE begun_at IS NOT NULL ORDER BY chosen_at, partition";
    let starts = sqlx::query_as(starts).fetch_all(pool).await;
    starts.expect("rows")
}

async fn begun(pool: &PgPool) {
    eventually("every partition has begun", async || {
        starts(pool).await.len() == PARTITIONS as usize
    })
    .await;
}

fn chosen(offsets: [i64; 4], by: &str) -> Vec<(i64, String)> {
    offsets
        .into_iter()
        .map(|offset| (offset, by.to_owned()))
        .collect()
}

#[tokio::test]
async fn latest_counts_once() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    send_old(&kafka).await;
    let latest = json!({"kafka": {"start": "latest"}});
    let app = TestApp::start(&pool, &kafka, latest.clone()).await;
    begun(&pool).await;
    assert_eq!(starts(&pool).await, chosen([2, 1, 0, 0], "latest"));
    assert_eq!(
        kafka.offsets().committed().values().sum::<i64>(),
        3,
        "before anything is read"
    );
    kafka.send(4, &event(7, 4, 2, "failed", AT)).await;
    eventually("what comes is saved", async || app.count("true").await == 1).await;
    app.finish().await;

    // a restart is no beginning: what came meanwhile is read
    kafka.send(8, &event(7, 8, 2, "failed", AT)).await;
    let app = TestApp::start(&pool, &kafka, latest.clone()).await;
    eventually("it is saved", async || app.count("true").await == 2).await;
    app.finish().await;

    // offsets that Kafka has lost are another matter: all is read, what is known is recognised
    kafka.group = format!("{}-again", kafka.group);
    let replica = Replica::start(&config_of(&pool, &kafka, latest));
    eventually("all are saved", async || count(&pool, "true").await == 5).await;
    let lost = replica.metrics(LOST).await;
    assert_eq!(lost.values().sum::<f64>(), f64::from(PARTITIONS));
    assert_eq!(starts(&pool).await, chosen([2, 1, 0, 0], "latest"));
    eventually("it has committed", async || kafka.committed(0) == Some(4)).await;
    let errors = replica.stop();
    let said = |line: &serde_json::Value| {
        line["level"] == "ERROR"
            && line["message"] == "offset is missing or out of range, reading from the earliest"
    };
    assert_eq!(
        errors.iter().filter(|line| said(line)).count(),
        PARTITIONS as usize
    );
}

#[tokio::test]
async fn a_group_that_has_read_goes_on_whatever_start_says() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    send_old(&kafka).await;
    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("it is read", async || {
        kafka.committed(0) == Some(2) && kafka.committed(1) == Some(1)
    })
    .await;
    app.finish().await;
    assert_eq!(starts(&pool).await, chosen([0; 4], "earliest"));
    // as the release before leaves it, which writes nothing down
    let forget = "DELETE FROM notifications.topic_start";
    sqlx::query(forget).execute(&pool).await.expect("deleted");
    kafka.send(4, &event(7, 4, 2, "failed", AT)).await;
    let app = TestApp::start(&pool, &kafka, json!({"kafka": {"start": "latest"}})).await;
    eventually("nothing is skipped", async || app.count("true").await == 4).await;
    begun(&pool).await;
    assert_eq!(starts(&pool).await, chosen([2, 1, 0, 0], "committed"));
    app.finish().await;
}

#[tokio::test]
async fn a_beginning_that_was_cut_is_made_again() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let latest = json!({"kafka": {"start": "latest"}});
    let app = TestApp::start(&pool, &kafka, latest.clone()).await;
    begun(&pool).await;
    app.finish().await;
    // as a process leaves it that dies between the table and Kafka: chosen, and the group has
    // nothing
    let cut = "UPDATE notifications.topic_start SET begun_at = NULL";
    sqlx::query(cut).execute(&pool).await.expect("cut");
    let mut kafka = kafka;
    kafka.group = format!("{}-again", kafka.group);
    send_old(&kafka).await;
    let replica = Replica::start(&config_of(&pool, &kafka, latest));
    eventually("from where it was to begin", async || {
        count(&pool, "true").await == 3
    })
    .await;
    let lost = replica.metrics(LOST).await;
    assert_eq!(lost.values().sum::<f64>(), 0.0);
    replica.stop();
}

#[tokio::test]
async fn offsets_of_a_broker_before_this_one_are_out_of_range() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    send_old(&kafka).await;
    kafka.commit(0, 100);
    kafka.commit(1, 1);
    let replica = Replica::start(&config_of(&pool, &kafka, json!({})));
    eventually("from the earliest", async || {
        count(&pool, "order_id IN (4, 8)").await == 2
    })
    .await;
    begun(&pool).await;
    assert_eq!(count(&pool, "true").await, 2, "the second goes on");
    let lost = replica.metrics(LOST).await;
    assert_eq!(lost.values().sum::<f64>(), 1.0);
    replica.stop();
}

/// Only Kafka looks for times; the mock has none.
#[tokio::test]
async fn a_time_is_where_kafka_has_it() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    if kafka.is_mock() {
        return;
    }
    let hours = |hours: i64| OffsetDateTime::now_utc() - time::Duration::hours(hours);
    for (order, age) in [(4, 3), (8, 1), (1, 3)] {
        let sent = hours(age);
        kafka
            .send_at(order, &event(7, order, 1, "new", AT), sent)
            .await;
    }
    let start = hours(2).format(&time::format_description::well_known::Rfc3339);
    let start = start.expect("a time");
    let app = TestApp::start(&pool, &kafka, json!({"kafka": {"start": start}})).await;
    begun(&pool).await;
    assert_eq!(starts(&pool).await, chosen([1, 1, 0, 0], &start));
    eventually("the later one is read", async || {
        app.count("order_id = 8").await == 1
    })
    .await;
    assert_eq!(app.count("true").await, 1);
    app.finish().await;
}

#[tokio::test]
async fn a_start_that_is_none_is_refused() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({"kafka": {"start": "yesterday"}}));
    let said = refused(&config, &["serve"]);
    assert!(
        said.contains("earliest, latest or a time of RFC 3339"),
        "{said}"
    );
}

#[tokio::test]
async fn a_partition_without_a_leader_holds_up_no_other() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    send_old(&kafka).await;
    // an Apache Kafka has one broker here
    if !kafka.lead(false) {
        return;
    }
    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("the others are read", async || app.count("true").await == 1).await;
    assert_eq!(starts(&pool).await.len(), PARTITIONS as usize - 1);
    kafka.send(1, &event(7, 1, 2, "failed", AT)).await;
    eventually("and go on", async || app.count("true").await == 2).await;
    kafka.lead(true);
    begun(&pool).await;
    eventually("nothing was skipped", async || app.count("true").await == 4).await;
    app.finish().await;
}

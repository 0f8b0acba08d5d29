//! Dead letters in their table: kept while their topic is missing, once each, for a while, and no
//! more than there is room for.

use serde_json::{Value, json};

use crate::{
    dead_letters::{consume_to, listed, replay, unmoved},
    kafka::{Kafka, event},
    process::{Replica, config_of, run},
    test_app::{TestApp, count, eventually},
};

const AT: &str = "2026-03-01T10:00:00Z";

#[tokio::test]
async fn a_topic_that_is_missing_keeps_nothing_waiting() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    kafka.dead_letter_topic = format!("{}-late", kafka.dead_letter_topic);
    let changes =
        json!({"inbox": {"dead_letter_timeout": "1s"}, "dead_letters": {"poll": "100ms"}});
    let config = config_of(&pool, &kafka, changes.clone());
    kafka.send(4, "poison").await;
    kafka.send(4, "more poison").await;
    let (partition, last) = kafka.send(4, &event(7, 4, 1, "new", AT)).await;
    let app = TestApp::start(&pool, &kafka, changes).await;
    eventually("the partition went on", async || {
        kafka.committed(partition) == Some(last + 1)
    })
    .await;
    eventually("it shows", async || {
        app.metric("notifications_dead_letters_unmoved").await == 2.0
            && app.metric("notifications_dead_letters_unmoved_bytes").await == 19.0
    })
    .await;
    let letters = listed(&config, &[]);
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0]["origin"]["offset"], 0);
    assert_eq!(
        (&letters[0]["value"], &letters[0]["topic"]),
        (&json!("poison"), &Value::Null)
    );
    let text = run(&config, &["dead-letters", "list"]);
    assert!(text.starts_with("row 1  "), "{text}");
    assert_eq!(
        replay(&config, &["--limit", "1"]),
        "1 dead letters put back"
    );
    eventually("it came back", async || {
        kafka.committed(partition) == Some(last + 2)
    })
    .await;
    // the second and the one that came back go to the topic as soon as there is one; the worker may
    // have been on its way with the first when that was put back, and nobody is shown it for that
    assert_eq!(listed(&config, &[]).len(), 2);
    kafka.create(&kafka.dead_letter_topic, 1).await;
    eventually("it has them", async || unmoved(&pool).await == 0).await;
    let shown = listed(&config, &[]);
    let values: Vec<_> = shown.iter().map(|letter| &letter["value"]).collect();
    assert_eq!(values, ["more poison", "poison"]);
    assert!(
        shown
            .iter()
            .all(|letter| letter["topic"] == *kafka.dead_letter_topic)
    );
    app.finish().await;
}

#[tokio::test]
async fn a_record_that_is_read_again_is_the_same_letter() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    kafka.send(4, "poison").await;
    for reading in ["first", "second"] {
        kafka.group = format!("{}-{reading}", kafka.group);
        consume_to(&pool, &kafka, 0, 1).await;
        kafka.dead_letters(1);
    }
    // a topic made anew has other records there
    let mut rebuilt = kafka.rebuilt().await;
    rebuilt.group = format!("{}-rebuilt", kafka.group);
    rebuilt.send(4, "other poison").await;
    consume_to(&pool, &rebuilt, 0, 1).await;
    rebuilt.dead_letters(1);
    let config = config_of(&pool, &rebuilt, json!({}));
    assert_eq!(listed(&config, &[]).len(), 2);
}

#[tokio::test]
async fn rows_go_when_the_topic_has_had_them_for_a_while() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    kafka.send(4, "poison").await;
    consume_to(&pool, &kafka, 0, 1).await;
    let aged = "UPDATE notifications.dead_letter SET moved_at = now() - interval '6 days 23 hours'";
    sqlx::query(aged).execute(&pool).await.expect("aged");
    let rows = async || {
        let rows = "SELECT count(*) FROM notifications.dead_letter";
        let rows = sqlx::query_scalar::<_, i64>(rows).fetch_one(&pool).await;
        rows.expect("a count")
    };
    // the second letter says that the worker has looked
    kafka.send(4, "more").await;
    consume_to(&pool, &kafka, 0, 2).await;
    assert_eq!(rows().await, 2);
    let aged = "UPDATE notifications.dead_letter SET moved_at = moved_at - interval '1 hour'";
    sqlx::query(aged).execute(&pool).await.expect("aged");
    kafka.send(4, "last").await;
    consume_to(&pool, &kafka, 0, 3).await;
    assert_eq!(rows().await, 2);
    assert_eq!(listed(&config, &[]).len(), 3);
}

#[tokio::test]
async fn without_room_the_partition_waits_and_the_others_go_on() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    kafka.dead_letter_topic = format!("{}-late", kafka.dead_letter_topic);
    let changes = json!({
        "inbox": {"dead_letter_timeout": "1s"},
        "dead_letters": {"poll": "100ms", "max_rows": 2},
    });
    for value in ["one", "two", "three"] {
        kafka.send(4, value).await;
    }
    kafka.send(4, &event(7, 4, 1, "new", AT)).await;
    let replica = Replica::start(&config_of(&pool, &kafka, changes));
    let held = async |count: f64| {
        let held = "notifications_consumer_partitions_held";
        replica.metrics(held).await.values().sum::<f64>() == count
    };
    eventually("it waits", async || held(1.0).await).await;
    assert_eq!(unmoved(&pool).await, 2);
    // of what was read at once nothing is committed before all of it is kept
    let committed = kafka.committed(0);
    assert!(committed <= Some(2), "{committed:?}");
    for (order, sequence, status) in [(1, 1, "new"), (1, 2, "failed"), (2, 1, "new")] {
        let (partition, last) = kafka
            .send(order, &event(7, order, sequence, status, AT))
            .await;
        eventually("the others go on", async || {
            kafka.committed(partition) == Some(last + 1)
        })
        .await;
    }
    // what comes meanwhile is not read
    let (_, last) = kafka.send(4, &event(7, 4, 2, "failed", AT)).await;
    assert!(held(1.0).await);
    kafka.create(&kafka.dead_letter_topic, 1).await;
    eventually("it goes on", async || kafka.committed(0) == Some(last + 1)).await;
    eventually("nothing waits", async || held(0.0).await).await;
    eventually("it has them", async || unmoved(&pool).await == 0).await;
    kafka.dead_letters(3);
    assert_eq!(count(&pool, "true").await, 5);
    replica.stop();
}

/// A worker that dies between the topic and the mark: the topic gets the letter once more, and
/// nobody sees it twice.
#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_before_letters_are_marked() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let changes = json!({
        "inbox": {"dead_letter_timeout": "1s"},
        "dead_letters": {"poll": "100ms"},
        "kafka": {"session_timeout": kafka.shortest_session()},
    });
    let config = config_of(&pool, &kafka, changes);
    kafka.send(4, "poison").await;
    let replica = Replica::start_with(&config, "letters-marking=return");
    replica.aborted().await;
    kafka.dead_letters(1);
    assert_eq!(unmoved(&pool).await, 1);
    let replica = Replica::start(&config);
    eventually("it is marked", async || unmoved(&pool).await == 0).await;
    replica.stop();
    assert_eq!(kafka.dead_letters(2).len(), 2, "at least once");
    assert_eq!(listed(&config, &[]).len(), 1);
    assert_eq!(replay(&config, &[]), "1 dead letters put back");
    assert!(listed(&config, &[]).is_empty());
}

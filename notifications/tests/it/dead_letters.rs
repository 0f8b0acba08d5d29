//! Dead letters as an operator meets them: listed, put back once their cause is mended, each once.

use std::path::Path;

use rdkafka::Message as _;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    kafka::{Kafka, event, header},
    process::{attempt, config_of, refused, run},
    test_app::{TestApp, eventually},
};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const AT: &str = "2026-03-01T10:00:00Z";

/// What `dead-letters list --json` says.
pub(crate) fn listed(config: &Path, options: &[&str]) -> Vec<Value> {
    let output = run(
        config,
        &[&["dead-letters", "list", "--json"], options].concat(),
    );
    let json = |line| serde_json::from_str(line).expect("every line is JSON");
    output.lines().map(json).collect()
}

pub(crate) fn replay(config: &Path, options: &[&str]) -> String {
    let output = run(config, &[&["dead-letters", "replay"], options].concat());
    output.trim_end().to_owned()
}

/// Runs the service until the group has read the partition up to `offset`.
pub(crate) async fn consume_to(pool: &PgPool, kafka: &Kafka, partition: i32, offset: i64) {
    let app = TestApp::start(pool, kafka, json!({})).await;
    eventually("the partition is read", || async {
        kafka.committed(partition) == Some(offset)
    })
    .await;
    eventually("the topic has them", async || unmoved(pool).await == 0).await;
    app.finish().await;
}

/// Letters that the topic has not.
pub(crate) async fn unmoved(pool: &PgPool) -> i64 {
    let rows = "SELECT count(*) FROM notifications.dead_letter WHERE moved_at IS NULL";
    let rows = sqlx::query_scalar(rows).fetch_one(pool).await;
    rows.expect("a count")
}

#[tokio::test]
async fn letters_are_listed_and_put_back_once_and_poison_comes_back() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    assert_eq!(
        run(&config, &["dead-letters", "list"]),
        "0 of 0 dead letters\n"
    );
    assert_eq!(replay(&config, &[]), "0 dead letters put back");

    kafka.send(4, &event(7, 4, 1, "new", AT)).await;
    let unreadable = kafka
        .send_record(4, Some(b"{\"UserId\":7"), Some(TRACEPARENT))
        .await;
    kafka.send_record(4, None, None).await;
    let taken = event(7, 4, 2, "awaiting payment", AT);
    kafka.send(4, &taken).await;
    let conflict = event(8, 4, 2, "awaiting payment", AT);
    let (partition, last) = kafka.send(4, &conflict).await;
    consume_to(&pool, &kafka, partition, last + 1).await;

    let letters = listed(&config, &[]);
    assert_eq!(letters.len(), 3);
    let first = &letters[0];
    assert_eq!(
        (&first["topic"], &first["partition"], &first["offset"]),
        (&json!(kafka.dead_letter_topic), &json!(0), &json!(0))
    );
    let from = json!({"topic": kafka.topic, "partition": unreadable.0, "offset": unreadable.1});
    assert_eq!(first["origin"], from);
    assert_eq!(
        (&first["cause"], &first["key"], &first["value"]),
        (&json!("unreadable"), &json!("4"), &json!("{\"UserId\":7"))
    );
    assert!(
        first["error"]
            .as_str()
            .expect("an error")
            .contains("EOF while parsing")
    );
    assert!(first["time"].as_str().expect("a time").ends_with('Z'));
    assert_eq!(listed(&config, &["--limit", "2"]), letters[..2]);
    let text = run(&config, &["dead-letters", "list", "--limit", "1"]);
    assert!(
        text.contains("  unreadable  from ") && text.ends_with("\n1 of 3 dead letters\n"),
        "{text}"
    );

    // the cause is mended: the events of a user whose order this was not are gone
    let mend = "DELETE FROM notifications.message WHERE order_id = 4";
    sqlx::query(mend).execute(&pool).await.expect("mended");
    assert_eq!(
        replay(&config, &["--limit", "1"]),
        "1 dead letters put back"
    );
    assert_eq!(replay(&config, &[]), "2 dead letters put back");
    assert_eq!(replay(&config, &[]), "0 dead letters put back");
    assert!(listed(&config, &[]).is_empty());
    assert_eq!(listed(&config, &["--all"]), letters);

    let records = kafka.records(&kafka.topic, partition, 5 + 3);
    for (again, before) in [(5, 1), (6, 2), (7, 4)] {
        let (again, before) = (&records[again], &records[before]);
        assert_eq!(
            (again.key(), again.payload()),
            (before.key(), before.payload())
        );
        assert_eq!(
            again.timestamp(),
            before.timestamp(),
            "the time of the first writing"
        );
        assert_eq!(header(again, "traceparent"), header(before, "traceparent"));
        assert_eq!(
            header(again, "origin.offset"),
            None,
            "nothing of the letter"
        );
    }
    assert_eq!(
        header(&records[5], "traceparent").as_deref(),
        Some(TRACEPARENT)
    );

    consume_to(&pool, &kafka, partition, last + 4).await;
    let saved = "SELECT user_id FROM notifications.message WHERE order_id = 4 AND sequence = 2";
    let saved: i64 = sqlx::query_scalar(saved)
        .fetch_one(&pool)
        .await
        .expect("the mended one");
    assert_eq!(saved, 8);
    let back = listed(&config, &[]);
    let offsets: Vec<_> = back
        .iter()
        .map(|letter| &letter["origin"]["offset"])
        .collect();
    assert_eq!(
        offsets,
        [last + 1, last + 2],
        "what is poison still is new letters"
    );
    assert_eq!(kafka.dead_letters(5).len(), 5);
}

#[tokio::test]
async fn a_letter_that_is_there_twice_or_not_whole_is_not_put_back_as_it_is() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    // fits as it is, but not with our headers
    let long = vec![b'x'; 999_700];
    // the parser quotes it, which would be as long again
    let quoted = format!(
        r#"{{"UserId":7,"OrderID":4,"Status":"{}"}}"#,
        "y".repeat(600_000)
    );
    kafka.send_record(4, Some(&long), Some(TRACEPARENT)).await;
    let (partition, last) = kafka.send(4, &quoted).await;
    consume_to(&pool, &kafka, partition, last + 1).await;

    let letters = listed(&config, &[]);
    assert_eq!(
        (&letters[0]["value"], &letters[0]["omitted"]),
        (&Value::Null, &json!("value"))
    );
    assert_eq!(letters[1]["value"], quoted, "kept whole");
    assert!(letters[1]["error"].as_str().expect("an error").len() <= 500);

    // as after a crash between a letter and the mark in its row; and what somebody else put there
    let twice = kafka.dead_letters(2).pop().expect("the second letter");
    kafka
        .put(&kafka.dead_letter_topic, twice.payload(), twice.headers())
        .await;
    kafka
        .put(&kafka.dead_letter_topic, Some(b"not ours"), None)
        .await;
    let shown = listed(&config, &[]);
    assert_eq!(shown[..2], letters);
    assert_eq!(
        (shown.len(), &shown[2]["value"]),
        (3, &json!("not ours")),
        "each once"
    );
    // the topic alone has them when their rows have gone, and those of the release before
    let rows =
        "WITH gone AS (DELETE FROM notifications.dead_letter RETURNING *) SELECT * FROM gone";
    let rows = sqlx::query(rows).fetch_all(&pool).await.expect("deleted");
    assert_eq!((rows.len(), listed(&config, &[]).len()), (2, 3));
    assert_eq!(
        replay(&config, &[]),
        "1 dead letters put back, 1 copies of them passed over, 2 cannot be put back, \
         they have no origin or no value: see dead-letters list --all"
    );
    assert_eq!(
        kafka.records(&kafka.topic, partition, 3)[2].payload(),
        Some(quoted.as_bytes())
    );
}

#[tokio::test]
async fn a_letter_too_long_for_the_topic_is_put_back_whole_from_its_row() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    let long = vec![b'x'; 999_700];
    let (partition, last) = kafka.send_record(4, Some(&long), Some(TRACEPARENT)).await;
    consume_to(&pool, &kafka, partition, last + 1).await;
    assert_eq!(listed(&config, &[])[0]["omitted"], "value");
    assert_eq!(replay(&config, &[]), "1 dead letters put back");
    let again = kafka
        .records(&kafka.topic, partition, 2)
        .pop()
        .expect("again");
    assert!(again.payload() == Some(&long[..]), "not as it was");
    assert_eq!(header(&again, "traceparent").as_deref(), Some(TRACEPARENT));
    assert!(listed(&config, &[]).is_empty());
}

#[tokio::test]
async fn two_replays_at_once_put_every_letter_back() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let config = config_of(&pool, &kafka, json!({}));
    let mut last = (0, 0);
    for number in 0..300 {
        last = kafka.send(4, &format!("poison {number}")).await;
    }
    consume_to(&pool, &kafka, last.0, last.1 + 1).await;

    let put_back = || -> Result<usize, String> {
        let said = attempt(&config, &["dead-letters", "replay"])?;
        let count = said.trim_end().strip_suffix(" dead letters put back");
        Ok(count.and_then(|count| count.parse().ok()).expect("a count"))
    };
    let both = std::thread::scope(|scope| {
        let (one, other) = (scope.spawn(put_back), scope.spawn(put_back));
        [one, other].map(|replay| replay.join().expect("it ran"))
    });
    match both {
        [Ok(one), Ok(other)] => {
            assert_eq!(one + other, 300, "{one} and {other}");
            let mut values: Vec<_> = kafka.records(&kafka.topic, last.0, 600)[300..]
                .iter()
                .map(|record| record.payload().expect("a value").to_vec())
                .collect();
            values.sort();
            values.dedup();
            assert_eq!(values.len(), 300, "each once");
        }
        // The only partition belongs to one of them at a time. The other either took it before the
        // first had committed, which the broker then refuses, or waited for it longer than it may.
        // Each says so, and leaves the rest to the next replay.
        [Err(said), _] | [_, Err(said)] => {
            let known = [
                "it may be put back once more",
                "another replay may be at work",
            ];
            assert!(known.iter().any(|known| said.contains(known)), "{said}");
            put_back().expect("nobody is in the way any more");
        }
    }
    assert_eq!(listed(&config, &[]), Vec::<Value>::new(), "letters left");
}

#[tokio::test]
async fn without_a_broker_or_the_topic_what_has_rows_is_shown() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    kafka.send(4, "poison").await;
    consume_to(&pool, &kafka, 0, 1).await;
    let (mut missing, mut away) = (kafka.clone(), kafka);
    missing.dead_letter_topic = "nowhere".to_owned();
    away.brokers = "127.0.0.1:1".to_owned();
    for kafka in [&missing, &away] {
        let shown = run(
            &config_of(&pool, kafka, json!({})),
            &["dead-letters", "list"],
        );
        assert!(shown.starts_with("row 1  "), "{shown}");
        assert!(shown.ends_with("\n1 of 1 dead letters\n"), "{shown}");
    }
    let said = refused(
        &config_of(&pool, &away, json!({})),
        &["dead-letters", "replay"],
    );
    assert!(said.contains("no broker answers"), "{said}");
    let config = config_of(&pool, &missing, json!({}));
    assert_eq!(replay(&config, &[]), "1 dead letters put back");
}

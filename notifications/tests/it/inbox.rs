//! Events come in through Kafka: each is kept once, none is lost, and none that is bad stops the others.

use rdkafka::Message as _;
use serde_json::json;

use crate::{
    kafka::{Kafka, event, header},
    test_app::{TestApp, count, eventually},
};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test]
async fn events_come_out_as_history_once_and_in_order() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let placed = event(7, 42, 1, "new", "2026-03-01T10:00:00.25Z");
    let reserved = event(7, 42, 2, "awaiting payment", "2026-03-01T10:00:00.25Z");
    kafka
        .send_record(42, Some(placed.as_bytes()), Some(TRACEPARENT))
        .await;
    kafka.send(42, &reserved).await;
    kafka.send(42, &placed).await;
    kafka
        .send(41, &event(7, 41, 1, "new", "2026-03-01T09:00:00Z"))
        .await;
    kafka
        .send(42, &event(7, 42, 3, "payed", "2026-03-01T10:05:00+00:00"))
        .await;
    kafka
        .send(43, &event(8, 43, 1, "new", "2026-03-01T09:30:00Z"))
        .await;
    let (partition, last) = kafka.send(42, &reserved).await;

    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("five events saved", || async {
        app.count("true").await == 5
    })
    .await;
    eventually("the last offset committed", || async {
        kafka.committed(partition) == Some(last + 1)
    })
    .await;

    let expected = [
        (41, "new"),
        (42, "new"),
        (42, "awaiting payment"),
        (42, "payed"),
    ];
    let expected = expected.map(|(order, status)| (order, status.to_owned()));
    assert_eq!(app.statuses(7).await, expected);
    let messages = app.history(7).await.messages;
    assert_eq!(messages[1].message, "order 42 is new");
    let at = messages[1].created_at.expect("a time");
    assert_eq!((at.seconds, at.nanos), (1_772_359_200, 250_000_000));
    assert_eq!(app.statuses(8).await, [(43, "new".to_owned())]);

    let traced = format!("traceparent = '{TRACEPARENT}' AND order_id = 42 AND sequence = 1");
    assert_eq!(
        app.count(&traced).await,
        1,
        "the publisher's trace is kept for the sending"
    );
    // without a key the messages go to the log, and that is the end of them
    eventually("all told", || async {
        app.count("told_at IS NULL").await == 0
    })
    .await;
    assert!(app.metric("notifications_counter_duplicates_total").await >= 2.0);
    assert!(app.metric("notifications_histogram_batch_size_count").await >= 1.0);
    app.finish().await;
}

#[tokio::test]
async fn what_cannot_be_saved_goes_to_the_dead_letters_and_the_partition_goes_on() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let at = "2026-03-01T10:00:00Z";
    kafka.send(4, &event(7, 4, 1, "new", at)).await;
    let unreadable = kafka
        .send_record(4, Some(b"{\"UserId\":7"), Some(TRACEPARENT))
        .await;
    let valueless = kafka.send_record(4, None, None).await;
    // valid JSON, a valid event, and text that PostgreSQL does not store: only the database can tell
    let refused = kafka
        .send(
            4,
            r#"{"UserId":7,"OrderID":4,"Status":"payed","Message":"\u0000"}"#,
        )
        .await;
    kafka.send(4, &event(7, 4, 2, "awaiting payment", at)).await;
    let conflict = kafka.send(4, &event(8, 4, 2, "awaiting payment", at)).await;
    let (partition, last) = kafka.send(4, &event(7, 4, 3, "payed", at)).await;

    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("the partition went on", || async {
        kafka.committed(partition) == Some(last + 1)
    })
    .await;
    let statuses = ["new", "awaiting payment", "payed"].map(|status| (4, status.to_owned()));
    assert_eq!(app.statuses(7).await, statuses);
    assert_eq!(app.count("true").await, 3);

    let mut letters = kafka.dead_letters(4);
    letters.sort_by_key(|letter| {
        header(letter, "origin.offset").and_then(|offset| offset.parse::<i64>().ok())
    });
    let expected = [
        (unreadable, "unreadable", "EOF while parsing"),
        (valueless, "unreadable", "no value"),
        (refused, "refused", "invalid byte sequence"),
        (conflict, "conflict", "order 4 has another event 2"),
    ];
    for (letter, ((partition, offset), cause, error)) in letters.iter().zip(expected) {
        assert_eq!(header(letter, "origin.topic").as_ref(), Some(&kafka.topic));
        assert_eq!(
            header(letter, "origin.partition"),
            Some(partition.to_string())
        );
        assert_eq!(header(letter, "origin.offset"), Some(offset.to_string()));
        assert_eq!(header(letter, "dead_letter.cause").as_deref(), Some(cause));
        let said = header(letter, "dead_letter.error").expect("an error");
        assert!(said.contains(error), "{said}");
        let time = header(letter, "dead_letter.time").expect("a time");
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        assert_eq!(letter.key(), Some(&b"4"[..]));
    }
    assert_eq!(
        letters[0].payload(),
        Some(&b"{\"UserId\":7"[..]),
        "as it came"
    );
    assert_eq!(
        header(&letters[0], "traceparent").as_deref(),
        Some(TRACEPARENT)
    );
    assert_eq!(letters[1].payload(), None);
    for (cause, least) in [("unreadable", 2.0), ("refused", 1.0), ("conflict", 1.0)] {
        let series = format!("notifications_counter_dead_letters_total{{cause=\"{cause}\"}}");
        assert!(app.metric(&series).await >= least, "{series}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_header_that_is_no_trace_context_costs_no_event() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let at = "2026-03-01T10:00:00Z";
    for (order, header) in [
        (4, TRACEPARENT.replace('f', "\0")),
        (8, "x".repeat(60_000)),
        (12, TRACEPARENT.to_owned()),
    ] {
        let event = event(7, order, 1, "new", at);
        kafka
            .send_record(order, Some(event.as_bytes()), Some(&header))
            .await;
    }
    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("all are saved", || async { app.count("true").await == 3 }).await;
    let kept = format!("order_id = 12 AND traceparent = '{TRACEPARENT}'");
    assert_eq!(app.count(&kept).await, 1);
    assert_eq!(app.count("traceparent IS NULL").await, 2);
    assert!(kafka.dead_letters(0).is_empty());
    app.finish().await;
}

#[tokio::test]
async fn a_topic_read_again_by_older_publishers_too_saves_nothing_twice() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    let before = time::OffsetDateTime::now_utc().unix_timestamp();
    // order, user and status say which event it is
    kafka
        .send(
            5,
            r#"{"UserID":7,"OrderID":5,"Status":"new","Message":"order 5 is new"}"#,
        )
        .await;
    kafka
        .send(
            5,
            r#"{"UserID":7,"OrderID":5,"Status":"new","Message":"order 5 is new"}"#,
        )
        .await;
    kafka
        .send(5, r#"{"UserId":7,"OrderID":5,"Status":"payed"}"#)
        .await;
    kafka
        .send(6, &event(7, 6, 1, "new", "2010-12-01T10:00:00Z"))
        .await;
    kafka.send(5, "poison").await;

    for reading in ["first", "second"] {
        kafka.group = format!("{}-{reading}", kafka.group);
        let app = TestApp::start(&pool, &kafka, json!({})).await;
        let done = || async { kafka.committed(1) == Some(4) && kafka.committed(2) == Some(1) };
        eventually(reading, done).await;
        let expected = [(6, "new"), (5, "new"), (5, "payed")];
        assert_eq!(
            app.statuses(7).await,
            expected.map(|(order, status)| (order, status.to_owned()))
        );
        let messages = app.history(7).await.messages;
        let at = messages[1].created_at.expect("a time").seconds;
        assert!(
            (before - 1..before + 60).contains(&at),
            "kafka's time, {at}"
        );
        assert_eq!(
            messages[2].message,
            "Order 5 of user 7 is payed: its goods are being prepared."
        );
        app.finish().await;
    }
    assert_eq!(count(&pool, "true").await, 3);
}

#[tokio::test]
async fn kafka_away_is_shown_and_stops_nothing() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    kafka.brokers = "127.0.0.1:1".to_owned();
    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("a report", async || {
        let report = app.get("/readyz").await;
        report["ready"] == true
            && report["database"] == "ok"
            && report["kafka"]
                .as_str()
                .is_some_and(|said| said.contains("no broker answers"))
    })
    .await;
    assert!(app.history(7).await.messages.is_empty());
    app.finish().await;
}

#[tokio::test]
async fn a_missing_topic_is_named() {
    let pool = crate::database().await;
    let mut kafka = Kafka::new().await;
    kafka.dead_letter_topic = "nowhere".to_owned();
    let app = TestApp::start(&pool, &kafka, json!({})).await;
    eventually("a report", async || {
        app.get("/readyz").await["kafka"] == "topic nowhere is missing"
    })
    .await;
    app.finish().await;
}

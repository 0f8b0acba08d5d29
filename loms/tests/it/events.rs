//! Events as consumers find them: exact JSON, keyed by order, in order, with the trace of whoever caused them.

use std::collections::{BTreeMap, BTreeSet};

use proto::loms::OrderPayedRequest;
use serde_json::json;
use sqlx::PgPool;

use crate::{
    kafka::{self, Event},
    oracle,
    test_app::{TestApp, eventually},
};

/// Waits until `many` events are in the log.
async fn events(app: &TestApp, pool: &PgPool, many: usize) -> Vec<Event> {
    eventually("an empty outbox", async || {
        oracle::count(pool, "SELECT count(*) FROM loms.outbox").await == 0
    })
    .await;
    let events = kafka::read_log(&app.topic).await;
    assert_eq!(events.len(), many, "{events:#?}");
    events
}

#[tokio::test]
async fn an_event_reads_as_the_contract_says() {
    let pool = crate::database().await;
    // the relay is woken by a commit: nobody waits until it looks by itself
    let app = TestApp::start(&pool, json!({"outbox": {"poll_interval": "60s"}})).await;
    eventually("a topic", async || {
        app.get("/readyz").await.json()["kafka"] == "ok"
    })
    .await;
    app.receive("d1", &[(1, 7, 1)]).await.unwrap();
    let id = app.create(12, &[(7, 1)]).await.order_id;
    app.pay(id).await.unwrap();
    let log = events(&app, &pool, 3).await;
    let times: Vec<(String,)> = oracle::rows(
        &pool,
        "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS') FROM loms.status_change ORDER BY sequence",
    )
    .await;
    for (n, (event, status)) in log
        .iter()
        .zip(["new", "awaiting payment", "payed"])
        .enumerate()
    {
        assert_eq!(event.key, id.to_string());
        let value = &event.value;
        let keys: Vec<_> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            [
                "UserId",
                "OrderID",
                "Status",
                "Message",
                "Sequence",
                "OccurredAt"
            ]
        );
        assert_eq!(
            (
                &value["UserId"],
                &value["OrderID"],
                &value["Status"],
                &value["Sequence"]
            ),
            (&json!(12), &json!(id), &json!(status), &json!(n + 1))
        );
        assert!(
            value["Message"]
                .as_str()
                .unwrap()
                .contains(&format!("{id}")),
            "{value}"
        );
        let at = value["OccurredAt"].as_str().unwrap();
        assert!(
            at.starts_with(&times[n].0) && at.ends_with('Z'),
            "{at} {times:?}"
        );
        assert!(event.text.starts_with(&format!(
            "{{\"UserId\":12,\"OrderID\":{id},\"Status\":\"{status}\",\"Message\":"
        )));
    }
    app.finish().await;
}

#[tokio::test]
async fn an_orders_events_share_a_partition_in_order() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"outbox": {"batch": 7}})).await;
    app.receive("d1", &[(1, 7, 40)]).await.unwrap();
    for n in 0..45 {
        let order = app.create(1, &[(7, 1)]).await;
        if n % 2 == 0 && order.status != "failed" {
            app.cancel(order.order_id).await.unwrap();
        }
    }
    let steps = oracle::count(&pool, "SELECT count(*) FROM loms.status_change").await;
    let log = events(&app, &pool, usize::try_from(steps).unwrap()).await;
    let mut partitions: BTreeMap<&str, BTreeSet<i32>> = BTreeMap::new();
    for event in &log {
        partitions
            .entry(&event.key)
            .or_default()
            .insert(event.partition);
    }
    assert!(
        partitions.values().all(|found| found.len() == 1),
        "{partitions:?}"
    );
    let used: BTreeSet<_> = partitions.values().flatten().collect();
    assert!(used.len() > 1, "every order went to one partition");
    app.finish().await;
}

#[tokio::test]
async fn an_event_carries_the_trace_of_its_call() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1)]).await.unwrap();
    let answer = app
        .post(
            "/createOrder",
            r#"{"user":1,"items":[{"sku":7,"count":1}]}"#,
        )
        .await;
    let placed = answer.header("x-trace-id").expect("a trace id").to_owned();
    let id = answer.json()["orderID"].as_str().unwrap().parse().unwrap();
    let mut request = tonic::Request::new(OrderPayedRequest { order_id: id });
    let payed = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{payed}-00f067aa0ba902b7-01");
    request
        .metadata_mut()
        .insert("traceparent", parent.parse().unwrap());
    let answer = app.grpc.clone().order_payed(request).await.unwrap();
    assert_eq!(answer.metadata().get("x-trace-id").unwrap(), payed);
    let log = events(&app, &pool, 3).await;
    for (event, trace) in log.iter().zip([placed.as_str(), &placed, payed]) {
        let parent = event.traceparent.as_deref().expect("traceparent");
        let parts: Vec<_> = parent.split('-').collect();
        assert_eq!((parts.len(), parts[0], parts[1]), (4, "00", trace));
    }
    app.finish().await;
}

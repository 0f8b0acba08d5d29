//! The HTTP door: JSON as grpc-gateway v2 speaks it, and what a caller gets who speaks it badly.

use serde_json::{Value, json};

use crate::{
    oracle::rows,
    test_app::{Answer, TestApp},
};

#[track_caller]
fn is_traced(answer: &Answer) {
    let id = answer.header("x-trace-id").expect("a trace id");
    assert!(
        id.len() == 32
            && id
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')),
        "{id}"
    );
    assert_ne!(id, "0".repeat(32));
    assert_eq!(answer.header("grpc-metadata-x-trace-id"), Some(id));
    assert_eq!(
        answer.header("grpc-metadata-content-type"),
        Some("application/grpc")
    );
}

#[track_caller]
pub(crate) fn is_problem(answer: &Answer, status: u16, code: i32) {
    is_traced(answer);
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let body = answer.json();
    assert_eq!(body["code"], code, "{body}");
    assert!(!body["message"].as_str().expect("a message").is_empty());
    assert!(body["details"].is_array(), "{body}");
}

async fn ok(app: &TestApp, path: &str, body: Value) -> Value {
    let answer = app.post(path, body.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    is_traced(&answer);
    answer.json()
}

#[tokio::test]
async fn every_route_answers_in_proto3_json() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(3, 7, 5)]).await.unwrap();
    let stocks = json!({"stocks": [{"warehouseID": "3", "count": "5"}]});
    assert_eq!(ok(&app, "/stocks", json!({"sku": 7})).await, stocks);
    assert_eq!(
        ok(&app, "/stocks", json!({"sku": 8})).await,
        json!({"stocks": []})
    );

    let wanted = json!({"user": "9", "items": [{"sku": 7, "count": 2}]});
    let created = ok(&app, "/createOrder", wanted).await;
    let id = created["orderID"]
        .as_str()
        .expect("an int64 is a string")
        .to_owned();
    let expected = json!({"orderID": id, "status": "awaiting payment", "shortages": []});
    assert_eq!(created, expected);

    let mut order = ok(&app, "/listOrder", json!({"orderID": id})).await;
    assert!(
        order["paymentDeadline"]
            .as_str()
            .expect("a time")
            .ends_with('Z'),
        "{order}"
    );
    for step in order["history"].as_array_mut().expect("a history") {
        assert!(
            step["at"].as_str().expect("a time").ends_with('Z'),
            "{step}"
        );
        step["at"] = "then".into();
    }
    order["createdAt"] = "then".into();
    order["paymentDeadline"] = "later".into();
    assert_eq!(
        order,
        json!({"status": "awaiting payment", "user": "9", "items": [{"sku": 7, "count": 2}],
               "paymentDeadline": "later", "createdAt": "then", "history": [
                   {"sequence": 1, "status": "new", "actor": "user", "at": "then", "fromStatus": ""},
                   {"sequence": 2, "status": "awaiting payment", "actor": "user", "at": "then", "fromStatus": "new"}]})
    );
    assert_eq!(
        ok(&app, "/orderPayed", json!({"orderID": id})).await,
        json!({})
    );
    let payed = ok(&app, "/listOrder", json!({"orderID": id})).await;
    assert_eq!(
        (&payed["status"], &payed["paymentDeadline"]),
        (&json!("payed"), &Value::Null)
    );
    assert!(payed.as_object().unwrap().contains_key("paymentDeadline"));

    let failed = ok(
        &app,
        "/createOrder",
        json!({"user": 9, "items": [{"sku": 7, "count": 4}]}),
    )
    .await;
    assert_eq!(failed["status"], "failed");
    let shortages = json!([{"sku": 7, "requested": "4", "available": "3"}]);
    assert_eq!(failed["shortages"], shortages);

    let third = ok(
        &app,
        "/createOrder",
        json!({"user": 9, "items": [{"sku": 7, "count": 3}]}),
    )
    .await;
    let cancelled = json!({"orderID": third["orderID"]});
    assert_eq!(ok(&app, "/cancelOrder", cancelled).await, json!({}));
    app.finish().await;
}

#[tokio::test]
async fn requests_are_read_as_grpc_gateway_reads_them() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1000)]).await.unwrap();
    let bodies = [
        r#"{"user": 1, "items": [{"sku": 7.0, "count": 1e2}], "idempotencyKey": "one"}"#,
        r#"{"user": "1", "items": [{"sku": "7", "count": "100"}], "idempotency_key": "one"}"#,
        r#"{"user": 1e0, "items": [{"sku": 7, "count": 60, "colour": "red"}, {"sku": 7, "count": 40}],
            "idempotency_key": "one", "nothing": {"like": ["this"]}}"#,
    ];
    let mut ids = Vec::new();
    for body in bodies {
        let answer = app.post("/createOrder", body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        ids.push(answer.json()["orderID"].clone());
    }
    assert!(ids.iter().all(|id| id == &ids[0]), "{ids:?}");
    // null is absent, in a field and in a key
    let answer = app
        .post(
            "/createOrder",
            r#"{"user":1,"items":[{"sku":7,"count":1}],"idempotencyKey":null}"#,
        )
        .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let orders: Vec<(i64, i64)> = rows(
        &pool,
        "SELECT sku, count FROM loms.order_item ORDER BY order_id",
    )
    .await;
    assert_eq!(orders, [(7, 100), (7, 1)]);

    for body in ["", "{}", " \n{ }", r#"{"sku":null}"#] {
        let answer = app.post("/stocks", body).await;
        is_problem(&answer, 400, 3);
        assert_eq!(
            answer.json()["details"][0]["fieldViolations"][0]["field"],
            "sku"
        );
    }
    app.finish().await;
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_and_the_service_goes_on() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1)]).await.unwrap();
    let unreadable = [
        "{",
        "[]",
        "7",
        "\"sku\"",
        "true",
        "{\"sku\":7}}",
        "{\"sku\":7,}",
        "\u{0}",
        "sku=7",
        r#"{"sku":-1}"#,
        r#"{"sku":4294967296}"#,
        r#"{"sku":1.5}"#,
        r#"{"sku":"seven"}"#,
        r#"{"sku":[7]}"#,
        r#"{"sku":{"a":1}}"#,
        r#"{"sku":true}"#,
        r#"{"sku":1e300}"#,
    ];
    for body in unreadable {
        is_problem(&app.post("/stocks", body).await, 400, 3);
    }
    is_problem(
        &app.post("/stocks", b"{\"sku\":7,\"\xff\":1}".to_vec())
            .await,
        400,
        3,
    );
    let deep = format!("{}{}", "[".repeat(8_000), "]".repeat(8_000));
    is_problem(&app.post("/stocks", deep).await, 400, 3);
    for items in [json!({"sku": 7}), json!([7]), json!("7"), json!([[]])] {
        let body = json!({"user": 1, "items": items}).to_string();
        is_problem(&app.post("/createOrder", body).await, 400, 3);
    }
    for user in [
        json!("9223372036854775808"),
        json!(1e19),
        json!("1.5"),
        json!({}),
    ] {
        let body = json!({"user": user, "items": [{"sku": 7, "count": 1}]}).to_string();
        is_problem(&app.post("/createOrder", body).await, 400, 3);
    }

    let five_mib = format!("{{\"sku\":7,\"pad\":\"{}\"}}", "x".repeat(5 << 20));
    is_problem(&app.post("/stocks", five_mib).await, 413, 8);
    for path in [
        "/createOrder",
        "/listOrder",
        "/orderPayed",
        "/cancelOrder",
        "/stocks",
    ] {
        for method in [
            reqwest::Method::GET,
            reqwest::Method::PUT,
            reqwest::Method::DELETE,
        ] {
            let url = format!("{}{path}", app.url);
            let answer = app.send(reqwest::Client::new().request(method, url)).await;
            is_problem(&answer, 405, 12);
            assert_eq!(answer.header("allow"), Some("POST"));
        }
    }
    is_problem(&app.get("/nowhere").await, 404, 5);
    is_problem(&app.post("/receiveStock", "{}").await, 404, 5);
    is_problem(&app.post("/stocks/", "{}").await, 404, 5);

    assert_eq!(
        ok(&app, "/stocks", json!({"sku": 7})).await["stocks"][0]["count"],
        "1"
    );
    app.finish().await;
}

#[tokio::test]
async fn a_wrong_field_is_named_as_the_services_own_refusals_name_theirs() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let refusal = async |path: &str, body: &str| {
        let answer = app.post(path, body.to_owned()).await;
        is_problem(&answer, 400, 3);
        answer.json()
    };
    let body = r#"{"user":1,"items":[{"sku":7,"count":1.5}]}"#;
    let description = "must be an integer, 0 to 4294967295";
    assert_eq!(
        refusal("/createOrder", body).await,
        json!({"code": 3, "message": format!("items[0].count: {description}"), "details": [{
            "@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [{
                "field": "items[0].count", "description": description, "reason": "", "localizedMessage": null}]}]})
    );
    let body = r#"{"user":1,"items":[{"sku":7,"count":0}]}"#;
    let own = refusal("/createOrder", body).await;
    let keys = |value: &Value| {
        let detail = &value["details"][0];
        let violation = detail["fieldViolations"][0].as_object().unwrap();
        (
            detail["@type"].clone(),
            violation.keys().cloned().collect::<Vec<_>>(),
        )
    };
    let read = refusal("/createOrder", r#"{"user":"one"}"#).await;
    assert_eq!(keys(&own), keys(&read));

    for (path, body, message) in [
        (
            "/listOrder",
            r#"{"orderId":"1"}"#,
            "orderId: must be spelled orderID",
        ),
        (
            "/orderPayed",
            r#"{"orderID":"1","orderID":"2"}"#,
            "orderID: must be given once",
        ),
        (
            "/createOrder",
            r#"{"idempotencyKey":"a","idempotency_key":"b"}"#,
            "idempotency_key: must be given once",
        ),
        (
            "/stocks",
            "{",
            "the body is not JSON: EOF while parsing an object (line 1, column 1)",
        ),
    ] {
        assert_eq!(refusal(path, body).await["message"], message, "{body}");
    }
    app.finish().await;
}

#[tokio::test]
async fn another_method_is_told_which_there_are() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    for (path, method, allowed) in [
        ("/metrics", "POST", "GET,HEAD"),
        ("/healthz", "POST", "GET,HEAD"),
        ("/readyz", "PUT", "GET,HEAD"),
        ("/openapi.json", "DELETE", "GET,HEAD"),
        ("/docs", "POST", "GET,HEAD"),
        ("/docs/", "POST", "GET,HEAD"),
        ("/createOrder", "PATCH", "POST"),
    ] {
        let url = format!("{}{path}", app.url);
        let method = method.parse().expect("a method");
        let answer = app.send(reqwest::Client::new().request(method, url)).await;
        is_problem(&answer, 405, 12);
        assert_eq!(answer.header("allow"), Some(allowed), "{path}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_callers_trace_goes_on() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let request = app
        .request("/stocks")
        .header("traceparent", parent)
        .body("{\"sku\":1}");
    let answer = app.send(request).await;
    assert_eq!(answer.header("x-trace-id"), Some(trace));
    let one = app.post("/stocks", "{\"sku\":1}").await;
    let other = app.post("/stocks", "{\"sku\":1}").await;
    assert_ne!(one.header("x-trace-id"), other.header("x-trace-id"));
    app.finish().await;
}

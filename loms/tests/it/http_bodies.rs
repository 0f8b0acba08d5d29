//! How large a body may be over HTTP, and what is in it, as the OpenAPI document says it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{http::is_problem, test_app::TestApp};

#[tokio::test]
async fn a_body_is_as_long_as_its_route_allows() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let small = TestApp::start(&pool, json!({"limits": {"body_bytes": 1000}})).await;
    let padded = |bytes: usize| format!("{{\"sku\":7}}{}", " ".repeat(bytes - 9));
    let (mib, sixteen) = (1 << 20, 16 << 10);
    for (app, path, limit) in [
        (&app, "/stocks", sixteen),
        (&app, "/createOrder", mib),
        (&small, "/stocks", 1000),
        (&small, "/createOrder", 1000),
    ] {
        let status = app.post(path, padded(limit)).await.status;
        assert_ne!(status, 413, "{path}");
        is_problem(&app.post(path, padded(limit + 1)).await, 413, 8);
    }
    small.finish().await;
    app.finish().await;
}

/// What the service says to `said`, until it closes the connection.
async fn heard(app: &TestApp, said: &str) -> String {
    let address = app.url.strip_prefix("http://").expect("an address");
    let mut stream = TcpStream::connect(address).await.expect("served");
    stream.write_all(said.as_bytes()).await.expect("sent");
    let mut heard = String::new();
    let closed = tokio::time::timeout(Duration::from_secs(30), stream.read_to_string(&mut heard));
    closed.await.expect("closed").expect("text");
    heard
}

#[tokio::test]
async fn a_body_that_would_be_too_large_is_not_asked_for() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let head = |path: &str, bytes: usize| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {bytes}\r\n\r\n"
        )
    };
    for (path, bytes) in [
        ("/stocks", 90_000_000),
        ("/stocks", 16_385),
        ("/createOrder", 1_048_577),
    ] {
        let heard = heard(&app, &head(path, bytes)).await;
        assert!(heard.starts_with("HTTP/1.1 413"), "{heard}");
        assert!(heard.contains("\r\nconnection: close\r\n"), "{heard}");
        assert!(heard.contains("\"code\":8"), "{heard}");
    }
    let said = head("/stocks", 9).replace("host: x", "host: x\r\nconnection: close");
    let heard = heard(&app, &format!("{said}{{\"sku\":7}}")).await;
    assert!(
        heard.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"),
        "{heard}"
    );
    app.finish().await;
}

#[tokio::test]
async fn the_bounds_of_the_document_are_those_of_the_service() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let document: Value = serde_json::from_str(proto::openapi::LOMS).expect("a document");
    let bound = |message: &str, field: &str, keyword: &str| {
        let properties = &document["components"]["schemas"][message]["properties"];
        let bound = properties[field][keyword].as_u64();
        bound.unwrap_or_else(|| panic!("{message}.{field} has no {keyword}"))
    };
    let order = "loms.CreateOrderRequest";
    let items = |count: u64| json!({"user": 1, "items": vec![json!({"sku": 1, "count": 1}); count as usize]});
    let item = |sku: u64, count: u64| json!({"user": 1, "items": [{"sku": sku, "count": count}]});
    let user = |user: u64| json!({"user": user, "items": [{"sku": 1, "count": 1}]});
    let key = |length: u64| {
        let mut order = item(1, 1);
        order["idempotencyKey"] = "k".repeat(length as usize).into();
        order
    };
    let (lines, least) = (
        bound(order, "items", "maxItems"),
        bound(order, "items", "minItems"),
    );
    let (few, many) = (
        bound("loms.OrderItem", "count", "minimum"),
        bound("loms.OrderItem", "count", "maximum"),
    );
    let (low, high) = (
        bound("loms.OrderItem", "sku", "minimum"),
        bound("loms.OrderItem", "sku", "maximum"),
    );
    let (first, length) = (
        bound(order, "user", "minimum"),
        bound(order, "idempotencyKey", "maxLength"),
    );
    for (within, beyond, field) in [
        (items(lines), items(lines + 1), "items"),
        (items(least), items(least - 1), "items"),
        (item(1, few), item(1, few - 1), "items[0].count"),
        (item(1, many), item(1, many + 1), "items[0].count"),
        (item(low, 1), item(low - 1, 1), "items[0].sku"),
        (item(high, 1), item(high + 1, 1), "items[0].sku"),
        (user(first), user(first - 1), "user"),
        (key(length), key(length + 1), "idempotency_key"),
    ] {
        let taken = app.post("/createOrder", within.to_string()).await;
        assert_eq!(taken.status, 200, "{field}: {taken:?}");
        let refused = app.post("/createOrder", beyond.to_string()).await;
        is_problem(&refused, 400, 3);
        let named = &refused.json()["details"][0]["fieldViolations"][0]["field"];
        assert_eq!(named, field, "{refused:?}");
    }
    let low = bound("loms.StocksRequest", "sku", "minimum");
    let body = |sku: u64| json!({"sku": sku}).to_string();
    assert_eq!(app.post("/stocks", body(low)).await.status, 200);
    is_problem(&app.post("/stocks", body(low - 1)).await, 400, 3);
    app.finish().await;
}

//! What no client of ours would send: a clear 4xx from each door, and the service goes on.

use devstack::clients::{Answer, Door};
use serde_json::json;

use crate::test_stack::TestStack;

/// A route of each door.
const ROUTES: [(Door, &str); 3] = [
    (Door::Checkout, "/addToCart"),
    (Door::Loms, "/createOrder"),
    (Door::Notifications, "/history"),
];

fn assert_error(answer: &Answer, status: u16, code: i64, what: &str) {
    assert_eq!(
        (answer.status, answer.body["code"].as_i64()),
        (status, Some(code)),
        "{what}: {}",
        answer.body
    );
    assert!(
        answer.body["message"].is_string() && answer.body["details"].is_array(),
        "{what}: {}",
        answer.body
    );
    assert_eq!(answer.headers["x-trace-id"].len(), 32, "{what}");
}

#[tokio::test]
async fn bad_requests_over_http_are_answered_clearly() {
    let stack = TestStack::start(&[(1, 85_123_001, 10)]).await;
    let http = &stack.clients.http;
    for (door, path) in ROUTES {
        for text in [
            "{\"user\":",
            "[]",
            "\"user\"",
            "{\"user\": \"one\"}",
            "{\"user\": 1.5}",
            "{\"user\": 1e40}",
            "\u{0}",
        ] {
            let answer = http.post_text(door, path, text.to_owned()).await.unwrap();
            assert_error(&answer, 400, 3, &format!("{path} {text}"));
        }
        let empty = http.post_text(door, path, String::new()).await.unwrap();
        assert_error(
            &empty,
            400,
            3,
            &format!("{path} without a body is an empty message"),
        );
        let deep = "[".repeat(10_000);
        let answer = http.post_text(door, path, deep).await.unwrap();
        assert_error(&answer, 400, 3, &format!("{path} nested deeply"));
        let large = format!("{{\"note\":\"{}\"}}", "x".repeat(5 << 20));
        let answer = http.post_text(door, path, large).await.unwrap();
        assert_error(&answer, 413, 8, &format!("{path} 5 MiB"));
        let answer = http.get(door, path).await.unwrap();
        assert_error(&answer, 405, 12, &format!("GET {path}"));
        assert_eq!(answer.headers["allow"], "POST", "{path}");
        let answer = http.post(door, "/nowhere", &json!({})).await.unwrap();
        assert_error(&answer, 404, 5, "an unknown path");
        for probe in ["/healthz", "/readyz", "/metrics"] {
            assert_eq!(
                http.get(door, probe).await.unwrap().status,
                200,
                "{door:?} {probe}"
            );
        }
    }
    let body = json!({"user": 1, "sku": 85_123_001, "count": 1});
    let answer = http
        .post(Door::Checkout, "/addToCart", &body)
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "the service goes on: {}", answer.body);
    stack.finish().await;
}

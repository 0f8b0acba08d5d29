//! Wrong requests, through both doors.

use proto::cart::{AddToCartRequest, PurchaseRequest};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    proxy::Proxy,
    test_app::{TestApp, eventually, refused},
};

fn fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let violations = status
        .get_details_bad_request()
        .expect("a BadRequest")
        .field_violations;
    violations
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

#[tokio::test]
async fn all_that_is_wrong_with_a_request_is_said_at_once() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 100_000);
    let table: [(i64, u32, u32, &[&str]); 7] = [
        (0, 5, 1, &["user"]),
        (-1, 5, 1, &["user"]),
        (1, 0, 1, &["sku"]),
        (1, 5, 0, &["count"]),
        (1, 5, 65_536, &["count"]),
        (1, 5, u32::MAX, &["count"]),
        (0, 0, 0, &["user", "sku", "count"]),
    ];
    for (user, sku, count, wrong) in table {
        assert_eq!(
            fields(&app.add(user, sku, count).await.unwrap_err()),
            wrong,
            "add {user} {sku} {count}"
        );
        assert_eq!(
            fields(&app.delete(user, sku, count).await.unwrap_err()),
            wrong,
            "delete {user} {sku} {count}"
        );
    }
    assert_eq!(fields(&app.list(0).await.unwrap_err()), ["user"]);
    assert_eq!(fields(&app.purchase(-7).await.unwrap_err()), ["user"]);
    for key in ["tab\t", "ключ", &"k".repeat(129)] {
        let status = app.purchase_with(1, key).await.unwrap_err();
        assert_eq!(fields(&status), ["idempotency_key"], "{key}");
    }
    assert_eq!(
        fields(&app.purchase_with(0, "é").await.unwrap_err()),
        ["user", "idempotency_key"]
    );
    assert_eq!(app.loms.stock_calls(), 0, "nothing wrong reaches LOMS");
    app.finish().await;
}

#[tokio::test]
async fn the_same_refusals_over_http() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 3);
    for (path, body, wrong) in [
        ("/addToCart", json!({}), 3),
        (
            "/deleteFromCart",
            json!({"user": "1", "sku": 0, "count": 70000}),
            2,
        ),
        ("/listCart", json!({"user": "-1"}), 1),
        ("/listCartRequest", json!({}), 1),
        (
            "/purchase",
            json!({"user": 1, "idempotencyKey": "\u{1}"}),
            1,
        ),
    ] {
        let (status, answer) = app.post(path, body.to_string()).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!(3)),
            "{path} {answer}"
        );
        assert_eq!(
            answer["details"][0]["@type"],
            "type.googleapis.com/google.rpc.BadRequest"
        );
        assert_eq!(
            answer["details"][0]["fieldViolations"]
                .as_array()
                .unwrap()
                .len(),
            wrong,
            "{path} {answer}"
        );
    }
    let add = json!({"user": "1", "sku": 5, "count": 4}).to_string();
    let (status, answer) = app.post("/addToCart", add).await;
    assert_eq!((status, &answer["code"]), (400, &json!(9)));
    assert_eq!(answer["details"][0]["reason"], "INSUFFICIENT_STOCK");
    let delete = json!({"user": "1", "sku": 5, "count": 4}).to_string();
    let (status, answer) = app.post("/deleteFromCart", delete).await;
    assert_eq!((status, &answer["code"]), (404, &json!(5)));
    let (status, answer) = app.post("/purchase", r#"{"user":1}"#).await;
    assert_eq!(
        (status, &answer["details"][0]["reason"]),
        (400, &json!("EMPTY_CART"))
    );
    app.finish().await;
}

#[tokio::test]
async fn what_is_no_request_at_all_is_a_clear_4xx() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    for body in [
        "{",
        "[]",
        r#"{"user":"x"}"#,
        r#"{"user":1.5}"#,
        r#"{"user":[1]}"#,
        r#"{"sku":-1}"#,
    ] {
        let (status, answer) = app.post("/addToCart", body).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!(3)),
            "{body} {answer}"
        );
    }
    let huge = format!(
        r#"{{"user":1,"idempotency_key":"{}"}}"#,
        "k".repeat(5 * 1024 * 1024)
    );
    let (status, answer) = app.post("/purchase", huge).await;
    assert_eq!((status, &answer["code"]), (413, &json!(8)));
    let (status, answer) = app.post("/nowhere", "{}").await;
    assert_eq!((status, &answer["code"]), (404, &json!(5)));
    let answer = app.get("/addToCart").await;
    assert_eq!(answer.status(), 405);
    assert_eq!(answer.headers()["allow"], "POST");
    assert_eq!(app.get("/healthz").await.status(), 200);
    assert_eq!(app.get("/readyz").await.status(), 200);
    app.finish().await;
}

#[tokio::test]
async fn a_whole_purchase_over_http() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 3);
    let (status, answer) = app
        .post(
            "/addToCart",
            r#"{"user":"1","sku":5,"count":2.0,"extra":null}"#,
        )
        .await;
    assert_eq!((status, answer), (200, json!({})));
    for path in ["/listCart", "/listCartRequest"] {
        let (status, answer) = app.post(path, r#"{"user":1}"#).await;
        let items = json!([{"sku": 5, "count": 2, "name": "product 5", "price": 10}]);
        assert_eq!(
            (status, answer),
            (200, json!({"items": items, "totalPrice": 20}))
        );
    }
    let (status, answer) = app
        .post("/purchase", r#"{"user":1,"idempotency_key":"k"}"#)
        .await;
    assert_eq!((status, answer), (200, json!({"orderID": "1"})));
    let (_, answer) = app.post("/listCart", r#"{"user":1}"#).await;
    assert_eq!(answer, json!({"items": [], "totalPrice": 0}));
    let metrics = app.get("/metrics").await.text().await.unwrap();
    for name in [
        r#"checkout_histogram_response_time_seconds_count{method="/cart.Cart/Purchase",status="OK"}"#,
        r#"checkout_counter_requests_total{type="router"}"#,
        "checkout_gauge_purchases_open",
        "checkout_gauge_purchases_oldest_seconds",
        r#"checkout_counter_purchases_closed_total{outcome="made"}"#,
        r#"checkout_counter_product_lookups_total{result="miss"}"#,
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_database_that_is_away_is_unavailable() {
    let pool = crate::database().await;
    let direct = testkit::url(&pool);
    let (login, server) = direct.rsplit_once('@').unwrap();
    let (server, database) = server.split_once('/').unwrap();
    let proxy = Proxy::start(server.to_owned()).await;
    let behind = format!("{login}@{}/{database}", proxy.address);
    let changes = json!({"postgres": {"connection_string": behind}});
    let app = TestApp::start_with(pool, changes).await;
    app.loms.stock(5, 3);
    app.add(1, 5, 1).await.unwrap();
    drop(proxy);
    for status in [
        app.add(1, 5, 1).await.unwrap_err(),
        app.delete(1, 5, 1).await.unwrap_err(),
        app.list(1).await.unwrap_err(),
        app.purchase(1).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(!status.message().contains("127.0.0.1"), "{status:?}");
    }
    eventually("a report", async || {
        app.get("/readyz").await.status() == 503
    })
    .await;
    assert_eq!(app.get("/healthz").await.status(), 200);
    app.finish().await;
}

#[tokio::test]
async fn keys_may_be_as_long_as_the_contract_says() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 3);
    app.client()
        .add_to_cart(AddToCartRequest {
            user: 1,
            sku: 5,
            count: 1,
        })
        .await
        .unwrap();
    let idempotency_key = "~ k".repeat(42) + "12";
    assert_eq!(idempotency_key.len(), 128);
    app.client()
        .purchase(PurchaseRequest {
            user: 1,
            idempotency_key,
        })
        .await
        .unwrap();
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

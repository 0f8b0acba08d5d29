//! Every refusal of the contract's table, over gRPC and over HTTP: code, details, and the same story on both.

use proto::loms as pb;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    oracle,
    test_app::{TestApp, order},
};

fn read<T: DeserializeOwned>(body: &Value) -> T {
    serde_json::from_value(body.clone()).expect("a request")
}

/// Refused over gRPC and over HTTP alike; returns the code and the details.
async fn refused(app: &TestApp, path: &str, body: Value) -> (Code, ErrorDetails) {
    let mut grpc = app.grpc.clone();
    let answer: Result<(), Status> = match path {
        "/createOrder" => grpc
            .create_order(read::<pb::CreateOrderRequest>(&body))
            .await
            .map(drop),
        "/listOrder" => grpc
            .list_order(read::<pb::ListOrderRequest>(&body))
            .await
            .map(drop),
        "/orderPayed" => grpc
            .order_payed(read::<pb::OrderPayedRequest>(&body))
            .await
            .map(drop),
        "/cancelOrder" => grpc
            .cancel_order(read::<pb::CancelOrderRequest>(&body))
            .await
            .map(drop),
        "/stocks" => grpc
            .stocks(read::<pb::StocksRequest>(&body))
            .await
            .map(drop),
        other => panic!("no route {other}"),
    };
    let status = answer.expect_err("a refusal");
    assert!(status.metadata().contains_key("x-trace-id"), "{status:?}");
    let details = status.get_error_details();

    let answer = app.post(path, body.to_string()).await;
    let expected = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition => 400,
        Code::NotFound => 404,
        other => panic!("{other:?} is no refusal of the table"),
    };
    assert_eq!(answer.status, expected, "{answer:?}");
    assert!(answer.header("x-trace-id").is_some());
    let mut listed = Vec::new();
    if let Some(bad) = details.bad_request() {
        let fields: Vec<_> = bad.field_violations.iter().map(|violation| {
            json!({"field": violation.field, "description": violation.description, "reason": "", "localizedMessage": null})
        }).collect();
        listed.push(json!({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": fields}));
    }
    if let Some(info) = details.error_info() {
        listed.push(
            json!({"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": info.reason,
                           "domain": info.domain, "metadata": info.metadata}),
        );
    }
    if let Some(failure) = details.precondition_failure() {
        let violations: Vec<_> = failure.violations.iter().map(|violation| {
            json!({"type": violation.r#type, "subject": violation.subject, "description": violation.description})
        }).collect();
        listed.push(json!({"@type": "type.googleapis.com/google.rpc.PreconditionFailure", "violations": violations}));
    }
    let body =
        json!({"code": status.code() as i32, "message": status.message(), "details": listed});
    assert_eq!(answer.json(), body);
    (status.code(), details)
}

/// The fields that are wrong.
async fn invalid(app: &TestApp, path: &str, body: Value) -> Vec<String> {
    let (code, details) = refused(app, path, body).await;
    assert_eq!(code, Code::InvalidArgument);
    let bad = details.bad_request().expect("BadRequest");
    bad.field_violations
        .iter()
        .map(|violation| violation.field.clone())
        .collect()
}

#[tokio::test]
async fn a_wrong_field_is_named_and_all_of_them_at_once() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1_000_000)]).await.unwrap();
    let order = |user: i64, items: Value| json!({"user": user, "items": items});
    let item = |sku: u32, count: u32| json!({"sku": sku, "count": count});
    let cases = [
        (order(0, json!([item(7, 1)])), vec!["user"]),
        (order(-1, json!([item(7, 1)])), vec!["user"]),
        (order(i64::MIN, json!([item(7, 1)])), vec!["user"]),
        (order(1, json!([])), vec!["items"]),
        (order(1, json!([item(0, 1)])), vec!["items[0].sku"]),
        (order(1, json!([item(7, 0)])), vec!["items[0].count"]),
        (
            order(1, json!([item(7, 1), item(7, 65_536)])),
            vec!["items[1].count"],
        ),
        (
            order(1, json!([item(7, 40_000), item(7, 40_000)])),
            vec!["items"],
        ),
        (order(1, json!([item(7, u32::MAX)])), vec!["items[0].count"]),
        (
            order(0, json!([item(0, 0), item(7, 1)])),
            vec!["user", "items[0].sku", "items[0].count"],
        ),
        (json!({}), vec!["user", "items"]),
    ];
    for (body, expected) in cases {
        assert_eq!(invalid(&app, "/createOrder", body).await, expected);
    }
    for key in ["é", "a\tb", "\u{7f}", &"k".repeat(129)] {
        let body = json!({"user": 1, "items": [item(7, 1)], "idempotencyKey": key});
        assert_eq!(
            invalid(&app, "/createOrder", body).await,
            ["idempotency_key"]
        );
    }
    let many: Vec<_> = (1..=1001).map(|sku| item(sku, 1)).collect();
    assert_eq!(
        invalid(&app, "/createOrder", order(1, json!(many))).await,
        ["items"]
    );
    assert_eq!(invalid(&app, "/stocks", json!({"sku": 0})).await, ["sku"]);
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await,
        0
    );
    // and what is just inside the bounds is no refusal
    assert_eq!(
        app.create(i64::MAX, &[(7, 65_535)]).await.status,
        "awaiting payment"
    );
    app.finish().await;
}

#[tokio::test]
async fn fifty_violations_are_listed_and_the_rest_counted() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let items: Vec<_> = (0..600).map(|_| json!({"sku": 0, "count": 0})).collect();
    let (code, details) = refused(&app, "/createOrder", json!({"user": 1, "items": items})).await;
    assert_eq!(code, Code::InvalidArgument);
    let violations = &details.bad_request().expect("BadRequest").field_violations;
    assert_eq!(violations.len(), 51);
    assert_eq!(violations[0].field, "items[0].sku");
    assert_eq!(violations[50].description, "and 1150 more");
    app.finish().await;
}

#[tokio::test]
async fn an_order_that_nobody_has_is_not_found() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    for id in [1, 0, -1, i64::MAX, i64::MIN] {
        for path in ["/listOrder", "/orderPayed", "/cancelOrder"] {
            let (code, _) = refused(&app, path, json!({"orderID": id.to_string()})).await;
            assert_eq!(code, Code::NotFound);
        }
    }
    app.finish().await;
}

#[tokio::test]
async fn a_status_that_does_not_allow_it_is_in_the_details() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    let payed = app.create(1, &[(7, 1)]).await.order_id;
    app.pay(payed).await.unwrap();
    let cancelled = app.create(1, &[(7, 1)]).await.order_id;
    app.cancel(cancelled).await.unwrap();
    let failed = app.create(1, &[(7, 5)]).await.order_id;
    for (path, id, status) in [
        ("/orderPayed", failed, "failed"),
        ("/orderPayed", cancelled, "cancelled"),
        ("/cancelOrder", payed, "payed"),
        ("/cancelOrder", failed, "failed"),
    ] {
        let (code, details) = refused(&app, path, json!({"orderID": id})).await;
        assert_eq!(code, Code::FailedPrecondition);
        let failure = details.precondition_failure().expect("PreconditionFailure");
        let [violation] = &failure.violations[..] else {
            panic!("{failure:?}")
        };
        assert_eq!(violation.subject, format!("orders/{id}"));
        assert_eq!(violation.r#type, "ORDER_STATUS");
        assert!(
            violation
                .description
                .contains(&format!("status is {status}")),
            "{violation:?}"
        );
    }
    // again is no refusal
    app.pay(payed).await.unwrap();
    app.cancel(cancelled).await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn a_key_that_stands_for_another_request_is_refused() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let order = |units: u32| json!({"user": 1, "items": [{"sku": 7, "count": units}], "idempotencyKey": "k"});
    let first = app.post("/createOrder", order(1).to_string()).await;
    assert_eq!(first.status, 200);
    let (code, details) = refused(&app, "/createOrder", order(2)).await;
    assert_eq!(code, Code::InvalidArgument);
    let info = details.error_info().expect("ErrorInfo");
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("IDEMPOTENCY_KEY_REUSED", "marketplace")
    );
    app.finish().await;
}

/// For a grpc-gateway that was compiled without `google.rpc`.
#[tokio::test]
async fn details_can_be_left_out() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"errors": {"details": false}})).await;
    let nothing = order(0, &[], "");
    let refused = app.grpc.clone().create_order(nothing).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("user"), "{refused:?}");
    assert!(refused.details().is_empty(), "{refused:?}");
    let answer = app.post("/createOrder", "{}".to_owned()).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["details"], json!([]), "{answer:?}");
    app.finish().await;
}

//! The contract's table of refusals for orders, each row over gRPC and over HTTP.

use devstack::clients::Door;
use proto::loms::ListOrderRequest;
use serde_json::json;
use tonic::Code;

use crate::{
    caller::{Caller, assert_refused, items},
    test_stack::TestStack,
};

/// In supply.
const HEART: u32 = 85_123_001;
/// One unit in all.
const JARS: u32 = 85_159_001;

#[tokio::test]
async fn loms_refuses_over_both_doors() {
    let stack = TestStack::start(&[(1, HEART, 10), (2, JARS, 1)]).await;
    let caller = Caller(stack.clients.clone());
    let many: Vec<_> = (1..=1001).map(|sku| (sku, 1)).collect();
    let bad: [(i64, &[(u32, u32)]); 6] = [
        (0, &[(HEART, 1)]),
        (5, &[]),
        (5, &[(0, 1)]),
        (5, &[(HEART, 0)]),
        (5, &[(HEART, 40_000), (HEART, 40_000)]),
        (5, &many),
    ];
    for (user, lines) in bad {
        let http = caller
            .post(
                Door::Loms,
                "/createOrder",
                json!({"user": user, "items": items(lines)}),
            )
            .await;
        assert_refused(
            caller.create(user, lines, "").await,
            &http,
            Code::InvalidArgument,
            "",
        );
    }
    let http = caller
        .post(Door::Loms, "/listOrder", json!({"orderID": "987654321"}))
        .await;
    let grpc = caller
        .0
        .loms
        .clone()
        .list_order(ListOrderRequest {
            order_id: 987_654_321,
        })
        .await;
    assert_eq!(
        (grpc.expect_err("a refusal").code(), http.status),
        (Code::NotFound, 404)
    );
    let http = caller
        .post(Door::Loms, "/stocks", json!({"sku": 424_242}))
        .await;
    assert_eq!((http.status, http.body), (200, json!({"stocks": []})));

    let failed = caller
        .create(5, &[(JARS, 2)], "")
        .await
        .unwrap()
        .into_inner();
    assert_eq!(failed.status, "failed");
    let shortages: Vec<_> = failed
        .shortages
        .iter()
        .map(|s| (s.sku, s.requested, s.available))
        .collect();
    assert_eq!(shortages, [(JARS, 2, 1)]);
    let http = caller
        .post(
            Door::Loms,
            "/createOrder",
            json!({"user": 5, "items": items(&[(JARS, 2)])}),
        )
        .await;
    assert_eq!(http.body["status"], "failed");
    let shortage = json!([{"sku": JARS, "requested": "2", "available": "1"}]);
    assert_eq!(http.body["shortages"], shortage);

    let payed = caller
        .create(5, &[(HEART, 2), (HEART, 1)], "key")
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        caller
            .create(5, &[(HEART, 3)], "key")
            .await
            .unwrap()
            .into_inner()
            .order_id,
        payed.order_id
    );
    let again = json!({"user": 5, "items": items(&[(HEART, 4)]), "idempotency_key": "key"});
    let http = caller.post(Door::Loms, "/createOrder", again).await;
    let grpc = caller.create(5, &[(HEART, 4)], "key").await;
    assert_refused(grpc, &http, Code::InvalidArgument, "IDEMPOTENCY_KEY_REUSED");

    caller.pay(payed.order_id).await.unwrap();
    caller.pay(payed.order_id).await.expect("again is OK");
    let cancelled = caller
        .create(5, &[(HEART, 1)], "")
        .await
        .unwrap()
        .into_inner();
    caller.cancel(cancelled.order_id).await.unwrap();
    caller
        .cancel(cancelled.order_id)
        .await
        .expect("again is OK");
    let id = |order: i64| json!({"orderID": order.to_string()});
    for order in [failed.order_id, cancelled.order_id] {
        let http = caller.post(Door::Loms, "/orderPayed", id(order)).await;
        assert_refused(caller.pay(order).await, &http, Code::FailedPrecondition, "");
    }
    for (order, status) in [(failed.order_id, "failed"), (payed.order_id, "payed")] {
        let http = caller.post(Door::Loms, "/cancelOrder", id(order)).await;
        assert_refused(
            caller.cancel(order).await,
            &http,
            Code::FailedPrecondition,
            "",
        );
        assert!(
            http.body["details"].to_string().contains(status),
            "the status is in the details: {}",
            http.body
        );
    }
    stack.finish().await;
}

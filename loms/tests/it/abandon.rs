//! AbandonOrder: a purchase that is given up leaves no order, whenever its CreateOrder comes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use pbjson_types::Timestamp;
use proto::loms::{self as pb, abandon_order_response::Outcome};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::test_app::{TestApp, order, sit_on};

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.expect("an ErrorInfo").reason
}

async fn abandon_since(
    app: &TestApp,
    user: i64,
    key: &str,
    first_tried_at: SystemTime,
) -> Result<Outcome, Status> {
    let since = first_tried_at.duration_since(UNIX_EPOCH).unwrap();
    let request = pb::AbandonOrderRequest {
        user,
        idempotency_key: key.to_owned(),
        first_tried_at: Some(Timestamp {
            seconds: since.as_secs().cast_signed(),
            nanos: since.subsec_nanos().cast_signed(),
        }),
    };
    let answer = app.grpc.clone().abandon_order(request).await?;
    Ok(answer.into_inner().outcome.expect("an outcome"))
}

async fn abandon(app: &TestApp, user: i64, key: &str) -> Outcome {
    abandon_since(app, user, key, SystemTime::now())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_key_without_an_order_gets_none_any_more() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 5)]).await.unwrap();
    for _ in 0..2 {
        assert!(matches!(abandon(&app, 1, "a").await, Outcome::Abandoned(_)));
    }
    let late = app.try_create(order(1, &[(7, 2)], "a")).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert_eq!(reason(&late), "KEY_ABANDONED");
    // a key is the user's own
    let placed = app.try_create(order(2, &[(7, 2)], "a")).await.unwrap();
    assert_eq!(placed.status, "awaiting payment");
    assert_eq!(app.stocks(7).await, [(1, 3)]);
    app.finish().await;
}

#[tokio::test]
async fn an_order_that_can_be_cancelled_is_and_another_is_told() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 5)]).await.unwrap();
    let keys = ["awaits", "payed", "cancelled"];
    let mut ids = Vec::new();
    for key in keys {
        let placed = app.try_create(order(1, &[(7, 1)], key)).await.unwrap();
        ids.push(placed.order_id);
    }
    let failed = app.try_create(order(1, &[(7, 9)], "failed")).await.unwrap();
    app.pay(ids[1]).await.unwrap();
    app.cancel(ids[2]).await.unwrap();
    for (key, id, status, short) in [
        ("awaits", ids[0], "cancelled", 0),
        ("payed", ids[1], "payed", 0),
        ("cancelled", ids[2], "cancelled", 0),
        ("failed", failed.order_id, "failed", 1),
    ] {
        for _ in 0..2 {
            let Outcome::Order(order) = abandon(&app, 1, key).await else {
                panic!("{key} has an order");
            };
            assert_eq!((order.order_id, order.status.as_str()), (id, status));
            assert_eq!(order.shortages.len(), short, "{key}");
        }
    }
    assert_eq!(app.stocks(7).await, [(1, 4)], "all but what is payed");
    let history = app.list(ids[0]).await.history;
    assert_eq!(history.last().unwrap().actor, "abandoned");
    // drained and audited
    app.finish().await;
}

#[tokio::test]
async fn of_an_order_under_way_it_waits_for_the_end() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 50)]).await.unwrap();
    // the batch has its key, and waits for the stock
    let sitting = sit_on(&pool, "stock WHERE sku = 7").await;
    let placing = app.try_create(order(1, &[(7, 2)], "a"));
    let given_up = async {
        crate::test_app::lock_waiters(&pool, 1).await;
        let abandoned = abandon(&app, 1, "a");
        let released = async {
            crate::test_app::lock_waiters(&pool, 2).await;
            sitting.rollback().await.unwrap();
        };
        tokio::join!(abandoned, released).0
    };
    let (placed, given_up) = tokio::join!(placing, given_up);
    let Outcome::Order(order) = given_up else {
        panic!("it found the order");
    };
    assert_eq!(order.order_id, placed.unwrap().order_id);
    assert_eq!(order.status, "cancelled");
    assert_eq!(app.stocks(7).await, [(1, 50)]);
    app.finish().await;
}

#[tokio::test]
async fn whoever_is_first_there_is_no_order_in_the_end() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1_000)]).await.unwrap();
    let rounds = (1..=60).map(async |user| {
        let placing = async || app.try_create(order(user, &[(7, 1)], "only")).await;
        if user % 2 == 0 {
            tokio::join!(placing(), abandon(&app, user, "only"))
        } else {
            let (abandoned, placed) = tokio::join!(abandon(&app, user, "only"), placing());
            (placed, abandoned)
        }
    });
    for (placed, abandoned) in join_all(rounds).await {
        match (placed, abandoned) {
            (Err(refused), Outcome::Abandoned(_)) => assert_eq!(reason(&refused), "KEY_ABANDONED"),
            (Ok(placed), Outcome::Order(order)) => assert_eq!(placed.order_id, order.order_id),
            (placed, abandoned) => panic!("{placed:?} beside {abandoned:?}"),
        }
    }
    assert_eq!(app.stocks(7).await, [(1, 1_000)]);
    app.finish().await;
}

#[tokio::test]
async fn an_old_key_may_be_swept_and_changes_nothing() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"keys": {"keep": "2h"}})).await;
    app.receive("d1", &[(1, 7, 5)]).await.unwrap();
    let placed = app.try_create(order(1, &[(7, 1)], "a")).await.unwrap();
    let ago = |minutes: u64| SystemTime::now() - Duration::from_secs(60 * minutes);
    let old = abandon_since(&app, 1, "a", ago(61)).await.unwrap_err();
    assert_eq!(old.code(), Code::FailedPrecondition);
    assert_eq!(reason(&old), "KEY_EXPIRED");
    assert_eq!(app.list(placed.order_id).await.status, "awaiting payment");
    let young = abandon_since(&app, 1, "a", ago(59)).await.unwrap();
    assert!(matches!(young, Outcome::Order(order) if order.status == "cancelled"));
    app.finish().await;
}

#[tokio::test]
async fn a_question_without_a_key_is_missing_all() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let mut loms = app.grpc.clone();
    let asked = loms.abandon_order(pb::AbandonOrderRequest::default());
    let status = asked.await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let wrong = status.get_details_bad_request().unwrap().field_violations;
    let wrong: Vec<_> = wrong.iter().map(|field| field.field.as_str()).collect();
    assert_eq!(wrong, ["user", "idempotency_key", "first_tried_at"]);
    app.finish().await;
}

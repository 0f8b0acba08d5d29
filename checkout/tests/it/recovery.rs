//! What the worker does when nobody calls.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use sqlx::PgPool;
use tokio::time::Instant;
use tonic::Code;

use crate::{
    loms_stub::Mood,
    test_app::{TestApp, eventually, fill, no_worker, refused},
};

async fn with_cart(pool: PgPool, changes: serde_json::Value) -> TestApp {
    let app = TestApp::start_with(pool, changes).await;
    app.loms.stock(5, 100);
    app.add(1, 5, 2).await.unwrap();
    app
}

async fn finished(app: &TestApp) {
    eventually("nothing is open", async || app.open_purchases().await == 0).await;
}

#[tokio::test]
async fn the_worker_finishes_what_is_open_and_the_next_call_is_told_once() {
    let pool = crate::database().await;
    let app = with_cart(pool, json!({})).await;
    app.loms.mood(Mood::LosesAnswers);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    app.loms.mood(Mood::Well);
    finished(&app).await;
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn a_refusal_found_by_the_worker_is_in_the_cart_again() {
    let pool = crate::database().await;
    let app = with_cart(pool, json!({})).await;
    app.loms.mood(Mood::Away);
    assert_eq!(
        app.purchase_with(1, "k").await.unwrap_err().code(),
        Code::Unavailable
    );
    app.loms.stock(5, 1);
    app.loms.mood(Mood::Well);
    finished(&app).await;
    assert_eq!(app.cart(1).await, [(5, 2)]);
    refused(
        app.purchase_with(1, "k").await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    app.finish().await;
}

#[tokio::test]
async fn an_outcome_that_went_out_is_not_told_to_an_emptied_cart_twice() {
    let pool = crate::database().await;
    let app = with_cart(pool, json!({})).await;
    app.loms.mood(Mood::Away);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    app.loms.stock(5, 0);
    app.loms.mood(Mood::Well);
    finished(&app).await;
    app.delete(1, 5, 2).await.unwrap();
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

/// As if five minutes had gone by since the purchases began, and the worker's time had come.
async fn grow_old(app: &TestApp) {
    let aged = "UPDATE checkout.purchase
                SET created_at = created_at - interval '5 minutes', next_attempt_at = clock_timestamp()";
    sqlx::query(aged).execute(&app.pool).await.unwrap();
}

#[tokio::test]
async fn an_old_purchase_is_cancelled_not_completed() {
    let pool = crate::database().await;
    let app = with_cart(pool, no_worker()).await;
    app.loms.mood(Mood::Away);
    let status = app.purchase(1).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    app.loms.mood(Mood::Well);
    grow_old(&app).await;
    finished(&app).await;
    assert_eq!(app.loms.orders()[0].status, "cancelled");
    assert_eq!(app.cart(1).await, [(5, 2)], "the lines are back");
    assert_eq!(app.loms.on_sale(5), 100, "and the units on sale");
    app.finish().await;
}

#[tokio::test]
async fn an_old_purchase_says_so_to_the_call_that_finds_it() {
    let pool = crate::database().await;
    let app = with_cart(pool, no_worker()).await;
    app.loms.mood(Mood::LosesAnswers);
    let status = app.purchase_with(1, "k").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    app.loms.mood(Mood::Well);
    grow_old(&app).await;
    for _ in 0..2 {
        let answer = app.purchase_with(1, "k").await;
        refused(answer, Code::FailedPrecondition, "ORDER_CANCELLED");
    }
    assert_eq!(app.purchase_with(1, "l").await.unwrap(), 2);
    app.finish().await;
}

#[tokio::test]
async fn an_old_purchase_whose_order_is_payed_is_made() {
    let pool = crate::database().await;
    let app = with_cart(pool, no_worker()).await;
    app.loms.mood(Mood::LosesAnswers);
    let status = app.purchase(1).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    app.loms.set_status(1, "payed");
    app.loms.mood(Mood::Well);
    grow_old(&app).await;
    finished(&app).await;
    assert_eq!(app.cart(1).await, []);
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    app.finish().await;
}

#[tokio::test]
async fn a_young_answer_does_not_close_what_is_being_resolved() {
    let pool = crate::database().await;
    let app = with_cart(pool, no_worker()).await;
    app.loms.mood(Mood::HoldsAfter);
    let ageing = async {
        app.loms.held().await;
        grow_old(&app).await;
        // the worker has said that it resolves it, and is asking LOMS before it cancels
        app.loms.held().await;
        // the call's answer, from when the order was fine
        app.loms.release_one();
        // which makes the call look again
        app.loms.held().await;
        app.loms.release();
        finished(&app).await;
    };
    let (bought, ()) = tokio::join!(app.purchase(1), ageing);
    refused(bought, Code::FailedPrecondition, "ORDER_CANCELLED");
    assert_eq!(app.cart(1).await, [(5, 2)]);
    app.finish().await;
}

#[tokio::test]
async fn at_most_four_are_finished_at_once() {
    let pool = crate::database().await;
    // who is held is not given up, however slow the machine
    let patience = json!({
        "loms": {"timeout": "60s"},
        "limits": {"request_timeout": "60s"},
        "purchases": {"resume_after": "120s"},
    });
    let app = TestApp::start_with(pool, patience).await;
    app.loms.stock(5, 100);
    // away all the time: the worker would finish what it finds between two users
    app.loms.mood(Mood::Away);
    for user in 1..=6 {
        fill(&app.pool, user, &(5..6)).await;
        let status = app.purchase(user).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
    }
    app.loms.mood(Mood::HoldsBefore);
    for _ in 0..4 {
        app.loms.held().await;
    }
    // the backoff of the other two is over by then
    let fifth = tokio::time::timeout(Duration::from_millis(500), app.loms.held()).await;
    assert!(fifth.is_err(), "a fifth came while four are held");
    app.loms.release();
    finished(&app).await;
    assert_eq!(app.loms.orders().len(), 6);
    assert_eq!(app.loms.most_placing(), 4);
    app.finish().await;
}

/// Attempts in vain at all purchases together.
async fn attempts(app: &TestApp) -> i64 {
    let attempts = "SELECT sum(attempts) FROM checkout.purchase";
    sqlx::query_scalar(attempts)
        .fetch_one(&app.pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_backlog_is_finished_soon_after_loms_is_back() {
    let pool = crate::database().await;
    // what the worker once fails to finish would stay open for an hour
    let app = TestApp::start_with(pool, no_worker()).await;
    app.loms.stock(5, 100);
    for user in 1..=40 {
        fill(&app.pool, user, &(5..6)).await;
    }
    app.loms.mood(Mood::Away);
    let bought = join_all((1..=40).map(|user| app.purchase(user))).await;
    assert!(bought.iter().all(Result::is_err));
    assert_eq!(app.open_purchases().await, 40);
    app.loms.mood(Mood::Well);
    let due = "UPDATE checkout.purchase SET next_attempt_at = clock_timestamp(), attempts = 0";
    sqlx::query(due).execute(&app.pool).await.unwrap();
    let began = Instant::now();
    finished(&app).await;
    // a worker that once waits in vain for a connection has lost a second
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(attempts(&app).await, 0, "finished at the first attempt");
    assert_eq!(app.loms.orders().len(), 40);
    app.finish().await;
}

#[tokio::test]
async fn a_purchase_that_could_not_be_closed_is_tried_again_soon() {
    let pool = crate::database().await;
    let changes = json!({
        "postgres": {"lock_timeout": "100ms"},
        "purchases": {"resume_after": "1h"},
    });
    let app = with_cart(pool, changes).await;
    app.loms.mood(Mood::Away);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    let mut tx = app.pool.begin().await.unwrap();
    let lock = "SELECT id FROM checkout.cart FOR UPDATE";
    sqlx::query(lock).execute(&mut *tx).await.unwrap();
    app.loms.mood(Mood::Well);
    eventually("it is ordered", async || app.loms.orders().len() == 1).await;
    let before = attempts(&app).await;
    let again = async || attempts(&app).await > before;
    eventually("it is put off because it cannot be closed", again).await;
    tx.commit().await.unwrap();
    finished(&app).await;
    assert_eq!(app.loms.orders().len(), 1);
    assert_eq!(app.cart(1).await, []);
    app.finish().await;
}

#[tokio::test]
async fn closed_purchases_are_swept_after_their_time() {
    let pool = crate::database().await;
    let changes = json!({"purchases": {"keep": "1s", "sweep_every": "50ms"}});
    let app = with_cart(pool, changes).await;
    assert_eq!(app.purchase_with(1, "k").await.unwrap(), 1);
    assert_eq!(app.purchase_with(1, "k").await.unwrap(), 1);
    let rows = async || -> i64 {
        let count = "SELECT (SELECT count(*) FROM checkout.purchase) + (SELECT count(*) FROM checkout.purchase_item)";
        sqlx::query_scalar(count)
            .fetch_one(&app.pool)
            .await
            .unwrap()
    };
    assert_eq!(rows().await, 2);
    eventually("the purchase and its line are swept", async || {
        rows().await == 0
    })
    .await;
    // the key is free again, and the cart was not touched
    refused(
        app.purchase_with(1, "k").await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    // its order lives on without it
    app.loms.set_status(1, "cancelled");
    app.finish().await;
}

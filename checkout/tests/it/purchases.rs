//! The purchase as callers see it: once, whatever LOMS does; what is left open is finished by the next call.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;
use tokio::{sync::oneshot, time::Instant};
use tonic::Code;

use crate::{
    loms_stub::Mood,
    test_app::{TestApp, eventually, no_worker, refused},
};

async fn with_cart(pool: PgPool) -> TestApp {
    let app = TestApp::start_with(pool, no_worker()).await;
    fill(&app).await;
    app
}

async fn fill(app: &TestApp) {
    for sku in [9, 5] {
        app.loms.stock(sku, 100);
        app.add(1, sku, 2).await.unwrap();
    }
}

const CART: [(u32, u32); 2] = [(5, 2), (9, 2)];

#[tokio::test]
async fn a_purchase_orders_the_cart_once() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    let id = app.purchase(1).await.unwrap();
    let orders = app.loms.orders();
    assert_eq!((orders.len(), orders[0].id, orders[0].user), (1, id, 1));
    assert_eq!(orders[0].lines, CART, "in the order of SKU");
    assert_eq!(app.loms.keys()[0].len(), 36, "a UUID is the key");
    assert_eq!(app.cart(1).await, []);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn without_the_stock_the_cart_is_as_it_was() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.stock(9, 1);
    let metadata = refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    assert_eq!(metadata["order_id"], "1");
    assert_eq!(
        metadata["shortages"],
        r#"[{"sku":9,"requested":2,"available":1}]"#
    );
    assert_eq!(app.cart(1).await, CART);
    app.loms.stock(9, 2);
    assert_eq!(app.purchase(1).await.unwrap(), 2);
    app.finish().await;
}

#[tokio::test]
async fn a_refusal_gives_lines_back_merged_with_what_was_added_since() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.stock(5, 1);
    app.loms.mood(Mood::HoldsBefore);
    let adding = async {
        app.loms.held().await;
        app.loms.stock(9, 50);
        app.loms.stock(7, 50);
        app.add(1, 9, 3).await.unwrap();
        app.add(1, 7, 1).await.unwrap();
        app.loms.release();
    };
    let (bought, ()) = tokio::join!(app.purchase(1), adding);
    refused(bought, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
    assert_eq!(app.cart(1).await, [(5, 2), (7, 1), (9, 5)]);
    app.finish().await;
}

#[tokio::test]
async fn what_is_added_meanwhile_stays_in_the_cart() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::HoldsAfter);
    let adding = async {
        app.loms.held().await;
        app.add(1, 5, 3).await.unwrap();
        assert_eq!(app.cart(1).await, [(5, 3)]);
        app.loms.release();
    };
    let (bought, ()) = tokio::join!(app.purchase(1), adding);
    bought.unwrap();
    assert_eq!(app.loms.orders()[0].lines, CART);
    assert_eq!(app.cart(1).await, [(5, 3)]);
    app.finish().await;
}

#[tokio::test]
async fn two_at_once_make_one_order() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::HoldsBefore);
    let releasing = async {
        app.loms.held().await;
        app.loms.held().await;
        app.loms.release();
    };
    let (one, two, ()) = tokio::join!(app.purchase(1), app.purchase(1), releasing);
    assert_eq!((one.unwrap(), two.unwrap()), (1, 1));
    assert_eq!(app.loms.orders().len(), 1);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn two_at_once_are_refused_alike_and_give_the_lines_back_once() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.stock(5, 0);
    app.loms.mood(Mood::HoldsBefore);
    let releasing = async {
        app.loms.held().await;
        app.loms.held().await;
        app.loms.release();
    };
    let (one, two, ()) = tokio::join!(app.purchase(1), app.purchase(1), releasing);
    refused(one, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
    refused(two, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
    assert_eq!(app.cart(1).await, CART);
    app.finish().await;
}

#[tokio::test]
async fn loms_away_leaves_it_open_for_the_next_call() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    for (mood, code) in [
        (Mood::Away, Code::Unavailable),
        (Mood::Busy, Code::ResourceExhausted),
        (Mood::Broken, Code::Internal),
    ] {
        app.loms.mood(mood);
        let status = app.purchase(1).await.unwrap_err();
        assert_eq!(status.code(), code, "{mood:?}");
        assert!(!status.message().contains("secret"), "{status:?}");
        assert_eq!(app.open_purchases().await, 1, "{mood:?}");
    }
    app.loms.mood(Mood::Well);
    let id = app.purchase(1).await.unwrap();
    assert_eq!(app.loms.orders().len(), 1);
    assert_eq!(app.loms.orders()[0].id, id);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn a_lost_answer_makes_no_second_order() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::LosesAnswers);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    app.loms.mood(Mood::Well);
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    assert_eq!(app.loms.orders().len(), 1);
    app.finish().await;
}

#[tokio::test]
async fn a_slow_loms_is_answered_within_the_deadline_and_the_outcome_is_told_next() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::Slow(Duration::from_secs(60)));
    let began = Instant::now();
    let answer = app.purchase_within(1, Duration::from_millis(400)).await;
    // the client's own timer says CANCELLED if it is the first
    assert!(matches!(
        answer.unwrap_err().code(),
        Code::DeadlineExceeded | Code::Cancelled
    ));
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    app.loms.mood(Mood::Well);
    assert_eq!(app.purchase(1).await.unwrap(), 1);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn a_caller_who_left_cuts_nothing_and_is_told_next() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::HoldsAfter);
    {
        let leaving = app.purchase(1);
        tokio::pin!(leaving);
        tokio::select! {
            _ = &mut leaving => panic!("answered although LOMS holds"),
            () = app.loms.held() => {}
        }
    }
    // the reset of the call has to reach the service before LOMS answers
    tokio::time::sleep(Duration::from_millis(100)).await;
    app.loms.release();
    eventually("the purchase is closed", async || {
        app.open_purchases().await == 0
    })
    .await;
    assert_eq!(app.loms.order_calls(), 1, "finished by the call's own task");
    assert_eq!(app.purchase(1).await.unwrap(), 1, "the outcome, told once");
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

#[tokio::test]
async fn an_order_that_loms_does_not_take_gives_the_lines_back() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::Refusing);
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "ORDER_REFUSED",
    );
    assert_eq!(app.cart(1).await, CART);
    app.finish().await;
}

#[tokio::test]
async fn an_order_that_was_cancelled_meanwhile_gives_the_lines_back() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::LosesAnswers);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    app.loms.set_status(1, "cancelled");
    app.loms.mood(Mood::Well);
    let metadata = refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "ORDER_CANCELLED",
    );
    assert_eq!(metadata["order_id"], "1");
    assert_eq!(app.cart(1).await, CART);
    app.finish().await;
}

#[tokio::test]
async fn a_key_makes_every_retry_exact() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    assert_eq!(app.purchase_with(1, "first").await.unwrap(), 1);
    assert_eq!(app.purchase_with(1, "first").await.unwrap(), 1);
    refused(
        app.purchase_with(1, "second").await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    fill(&app).await;
    assert_eq!(
        app.purchase_with(1, "first").await.unwrap(),
        1,
        "whatever the cart holds now"
    );
    assert_eq!(app.cart(1).await, CART);
    assert_eq!(app.purchase_with(1, "second").await.unwrap(), 2);

    app.add(2, 5, 1).await.unwrap();
    assert_eq!(
        app.purchase_with(2, "first").await.unwrap(),
        3,
        "a key is its user's own"
    );
    app.finish().await;
}

#[tokio::test]
async fn a_refusal_is_replayed_too() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.stock(5, 1);
    let first = refused(
        app.purchase_with(1, "k").await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    app.loms.stock(5, 100);
    let again = refused(
        app.purchase_with(1, "k").await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    assert_eq!(first, again);
    assert_eq!(app.cart(1).await, CART);
    app.purchase_with(1, "l").await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn an_open_purchase_of_another_key_is_finished_first() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::Away);
    assert_eq!(
        app.purchase_with(1, "a").await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(
        app.purchase_with(1, "b").await.unwrap_err().code(),
        Code::Unavailable
    );
    app.loms.mood(Mood::Well);
    app.add(1, 5, 7).await.unwrap();
    assert_eq!(app.purchase_with(1, "b").await.unwrap(), 2);
    assert_eq!(app.purchase_with(1, "a").await.unwrap(), 1);
    let orders = app.loms.orders();
    assert_eq!(
        (&orders[0].lines[..], &orders[1].lines[..]),
        (&CART[..], &[(5, 7)][..])
    );
    app.finish().await;
}

#[tokio::test]
async fn a_purchase_without_a_key_takes_that_of_the_call_it_answers() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::Away);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    app.loms.mood(Mood::Well);
    assert_eq!(app.purchase_with(1, "k").await.unwrap(), 1);
    fill(&app).await;
    assert_eq!(app.purchase_with(1, "k").await.unwrap(), 1);
    assert_eq!(app.purchase(1).await.unwrap(), 2);
    app.finish().await;
}

#[tokio::test]
async fn an_outcome_that_came_too_late_for_its_caller_is_told_next() {
    let pool = crate::database().await;
    let app = with_cart(pool).await;
    app.loms.mood(Mood::HoldsAfter);
    // between asking whether the caller is there and the commit, something takes longer than the caller waits
    let (answered, late) = oneshot::channel::<()>();
    let delaying = async {
        app.loms.held().await;
        let mut tx = app.pool.begin().await.unwrap();
        let lock = "SELECT id FROM checkout.purchase FOR UPDATE";
        sqlx::query(lock).execute(&mut *tx).await.unwrap();
        app.loms.release();
        late.await.unwrap();
        tx.commit().await.unwrap();
    };
    let hurried = async {
        let wait = Some(Duration::from_secs(1));
        let code = app.code("/purchase", json!({"user": 1}), wait).await;
        answered.send(()).unwrap();
        code
    };
    let (code, ()) = tokio::join!(hurried, delaying);
    assert_eq!(code, Code::DeadlineExceeded);
    eventually("the purchase is closed", async || {
        app.open_purchases().await == 0
    })
    .await;
    assert_eq!(app.purchase(1).await.unwrap(), 1, "the outcome, told once");
    refused(
        app.purchase(1).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    app.finish().await;
}

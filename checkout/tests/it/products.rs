//! The ProductService client: cache, flights, limits, fairness, failures.

use std::time::Duration;

use futures::future::join_all;
use proto::cart::ListCartRequest;
use serde_json::json;
use sqlx::PgPool;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use crate::test_app::{TestApp, eventually, refused};

async fn with_carts(
    pool: PgPool,
    changes: serde_json::Value,
    carts: &[(i64, std::ops::Range<u32>)],
) -> TestApp {
    let app = TestApp::start_with(pool, changes).await;
    for (user, skus) in carts {
        for sku in skus.clone() {
            app.loms.stock(sku, 100);
            app.add(*user, sku, 1).await.unwrap();
        }
    }
    app
}

async fn list_within(app: &TestApp, user: i64, allowed: Duration) -> Result<usize, Status> {
    let mut request = Request::new(ListCartRequest { user });
    request.set_timeout(allowed);
    app.client()
        .list_cart(request)
        .await
        .map(|response| response.into_inner().items.len())
}

#[tokio::test]
async fn what_was_asked_once_is_kept() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 1..4)]).await;
    app.list(1).await.unwrap();
    app.list(1).await.unwrap();
    assert_eq!(app.products.requests(), 3);
    app.finish().await;
}

#[tokio::test]
async fn the_cache_can_be_off_and_prices_age() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({"products": {"cache_ttl": "0s"}}), &[(1, 5..6)]).await;
    assert_eq!(app.list(1).await.unwrap().total_price, 10);
    app.products.price(5, 11);
    assert_eq!(app.list(1).await.unwrap().total_price, 11);
    app.finish().await;
}

#[tokio::test]
async fn a_price_is_asked_for_again_when_its_time_is_over() {
    let pool = crate::database().await;
    let app = with_carts(
        pool,
        json!({"products": {"cache_ttl": "300ms"}}),
        &[(1, 5..6)],
    )
    .await;
    assert_eq!(app.list(1).await.unwrap().total_price, 10);
    app.products.price(5, 11);
    eventually("the new price", async || {
        app.list(1).await.unwrap().total_price == 11
    })
    .await;
    assert_eq!(app.products.asked(5), 2);
    app.finish().await;
}

#[tokio::test]
async fn many_who_ask_for_one_sku_share_one_request() {
    let pool = crate::database().await;
    for ttl in ["300s", "0s"] {
        let app = with_carts(pool.clone(), json!({"products": {"cache_ttl": ttl}}), &[]).await;
        app.loms.stock(5, 100);
        for user in 1..=20 {
            // the second round of the loop finds the carts of the first
            app.add(user, 5, 1).await.unwrap();
        }
        app.products.delay(Duration::from_secs(1));
        let listed = join_all((1..=20).map(|user| app.list(user))).await;
        assert!(listed.iter().all(Result::is_ok));
        assert_eq!(app.products.asked(5), 1, "cache {ttl}");
        app.finish().await;
    }
}

#[tokio::test]
async fn a_flight_goes_on_when_its_caller_has_left() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 5..6)]).await;
    app.products.delay(Duration::from_secs(1));
    assert!(
        list_within(&app, 1, Duration::from_millis(100))
            .await
            .is_err()
    );
    assert_eq!(
        list_within(&app, 1, Duration::from_secs(3)).await.unwrap(),
        1
    );
    assert_eq!(app.products.asked(5), 1);
    app.finish().await;
}

#[tokio::test]
async fn a_slow_productservice_gets_five_at_once() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 1..13)]).await;
    app.products.delay(Duration::from_millis(600));
    assert_eq!(app.list(1).await.unwrap().items.len(), 12);
    assert_eq!(app.products.most_at_once(), 5);
    assert!(app.products.most_in_a_second() <= 10);
    app.finish().await;
}

#[tokio::test]
async fn a_hiccup_is_not_seen_by_the_caller() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 5..6)]).await;
    app.products
        .fail_next(&[Code::Unavailable, Code::ResourceExhausted]);
    assert_eq!(app.list(1).await.unwrap().items.len(), 1);
    assert_eq!(app.products.asked(5), 3);
    app.finish().await;
}

#[tokio::test]
async fn a_limit_that_others_have_used_up_is_waited_out() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 5..6)]).await;
    app.products.use_up();
    assert_eq!(app.list(1).await.unwrap().items.len(), 1);
    assert_eq!(app.products.asked(5), 2);
    app.finish().await;
}

#[tokio::test]
async fn who_has_no_time_for_another_try_hears_why() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 5..6)]).await;
    app.products.fail_always(Some(Code::ResourceExhausted));
    // the allowance comes back in a second
    let wait = Some(Duration::from_secs(1));
    let code = app.code("/listCart", json!({"user": 1}), wait).await;
    assert_eq!(code, Code::Unavailable);
    assert_eq!(app.products.asked(5), 1);
    app.products.fail_always(None);
    assert_eq!(app.list(1).await.unwrap().items.len(), 1);
    app.finish().await;
}

#[tokio::test]
async fn failures_are_said_as_documented_and_never_kept() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({}), &[(1, 5..6)]).await;
    for (theirs, ours, requests) in [
        (Code::Unavailable, Code::Unavailable, 3),
        (Code::ResourceExhausted, Code::Unavailable, 3),
        (Code::PermissionDenied, Code::Internal, 1),
    ] {
        let before = app.products.asked(5);
        app.products.fail_always(Some(theirs));
        let status = app.list(1).await.unwrap_err();
        assert_eq!(status.code(), ours, "{theirs:?}");
        assert!(!status.message().contains("secret"), "{status:?}");
        assert_eq!(app.products.asked(5) - before, requests, "{theirs:?}");
    }
    app.products.fail_always(Some(Code::NotFound));
    refused(app.list(1).await, Code::NotFound, "PRODUCT_UNKNOWN");
    app.products.fail_always(None);
    assert_eq!(app.list(1).await.unwrap().items.len(), 1);
    app.finish().await;
}

#[tokio::test]
async fn a_hanging_productservice_is_answered_within_the_deadline() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({"products": {"timeout": "3s"}}), &[(1, 5..6)]).await;
    app.products.delay(Duration::from_secs(3600));
    let began = Instant::now();
    assert!(
        list_within(&app, 1, Duration::from_millis(300))
            .await
            .is_err()
    );
    assert!(
        began.elapsed() < Duration::from_millis(2_500),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(
        app.list(1).await.unwrap_err().code(),
        Code::DeadlineExceeded
    );
    app.products.delay(Duration::ZERO);
    assert_eq!(app.list(1).await.unwrap().items.len(), 1);
    app.finish().await;
}

#[tokio::test]
async fn a_wrong_token_is_our_mistake_not_the_callers() {
    let pool = crate::database().await;
    let app = with_carts(pool, json!({"token": "other"}), &[(1, 5..6)]).await;
    let status = app.list(1).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Internal, "internal error")
    );
    app.finish().await;
}

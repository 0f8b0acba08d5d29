//! Adding, deleting, listing.

use std::time::Duration;

use futures::{StreamExt as _, future::join3, stream};
use proto::cart::ListCartRequest;
use serde_json::json;
use tonic::{Code, codec::CompressionEncoding};

use crate::{
    loms_stub::Mood,
    test_app::{TestApp, fill, refused},
};

#[tokio::test]
async fn a_cart_is_filled_listed_and_emptied() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(3, 10);
    app.loms.stock(5, 10);
    app.products.price(5, 70);

    app.add(1, 5, 2).await.unwrap();
    app.add(1, 3, 1).await.unwrap();
    app.add(1, 5, 1).await.unwrap();
    app.add(2, 5, 9).await.unwrap();

    let listed = app.list(1).await.unwrap();
    let lines: Vec<_> = listed
        .items
        .iter()
        .map(|item| (item.sku, item.count, item.name.as_str(), item.price))
        .collect();
    assert_eq!(lines, [(3, 1, "product 3", 10), (5, 3, "product 5", 70)]);
    assert_eq!(listed.total_price, 10 + 3 * 70);
    let mut compressing = app.client().send_compressed(CompressionEncoding::Gzip);
    let asked = compressing.list_cart(ListCartRequest { user: 1 }).await;
    assert_eq!(asked.unwrap().into_inner(), listed);

    app.delete(1, 5, 1).await.unwrap();
    assert_eq!(app.cart(1).await, [(3, 1), (5, 2)]);
    app.delete(1, 5, 99).await.unwrap();
    assert_eq!(app.cart(1).await, [(3, 1)]);
    let metadata = refused(app.delete(1, 5, 1).await, Code::NotFound, "NOT_IN_CART");
    assert_eq!(metadata["sku"], "5");
    refused(app.delete(77, 5, 1).await, Code::NotFound, "NOT_IN_CART");
    assert_eq!(app.cart(2).await, [(5, 9)]);
    app.finish().await;
}

#[tokio::test]
async fn a_unit_that_nobody_has_is_refused() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 7);
    app.add(1, 5, 4).await.unwrap();
    let metadata = refused(
        app.add(1, 5, 4).await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    assert_eq!(
        (
            &*metadata["sku"],
            &*metadata["available"],
            &*metadata["in_cart"]
        ),
        ("5", "7", "4")
    );
    refused(
        app.add(1, 6, 1).await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    app.add(1, 5, 3).await.unwrap();
    assert_eq!(app.cart(1).await, [(5, 7)]);
    app.finish().await;
}

#[tokio::test]
async fn a_cart_has_room_for_65535_units_of_a_sku() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, u64::MAX);
    app.add(1, 5, 65_535).await.unwrap();
    refused(
        app.add(1, 5, 1).await,
        Code::FailedPrecondition,
        "CART_FULL",
    );
    assert_eq!(app.cart(1).await, [(5, 65_535)]);
    app.finish().await;
}

#[tokio::test]
async fn a_cart_has_room_for_1000_skus_and_all_of_them_are_ordered() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    for sku in 1..=1001 {
        app.loms.stock(sku, 10);
    }
    let adding = stream::iter(1..=1000)
        .map(|sku| app.add(1, sku, 1))
        .buffer_unordered(8);
    adding.for_each(async |added| added.unwrap()).await;
    refused(
        app.add(1, 1001, 1).await,
        Code::FailedPrecondition,
        "CART_FULL",
    );
    app.add(1, 1000, 1).await.unwrap();

    app.purchase(1).await.unwrap();
    let order = &app.loms.orders()[0];
    assert_eq!(order.lines.len(), 1000);
    assert!(order.lines.is_sorted());
    app.add(1, 1001, 1).await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn lines_of_an_open_purchase_take_room() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 1_000_000);
    app.add(1, 5, 65_000).await.unwrap();
    app.loms.mood(Mood::Away);
    assert_eq!(app.purchase(1).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(app.open_purchases().await, 1);
    // well again for the stock, but out of what was ordered, so that the lines come back
    app.loms.mood(Mood::HoldsBefore);
    app.add(1, 5, 535).await.unwrap();
    refused(
        app.add(1, 5, 1).await,
        Code::FailedPrecondition,
        "CART_FULL",
    );
    app.loms.stock(5, 0);
    app.loms.release();
    crate::test_app::eventually("the lines are back", async || {
        app.open_purchases().await == 0
    })
    .await;
    assert_eq!(app.cart(1).await, [(5, 65_535)]);
    app.finish().await;
}

#[tokio::test]
async fn a_total_that_does_not_fit_is_out_of_range() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 10);
    app.products.price(5, u32::MAX);
    app.add(1, 5, 1).await.unwrap();
    assert_eq!(app.list(1).await.unwrap().total_price, u32::MAX);
    app.add(1, 5, 1).await.unwrap();
    assert_eq!(app.list(1).await.unwrap_err().code(), Code::OutOfRange);
    app.finish().await;
}

#[tokio::test]
async fn products_that_nobody_knows_are_named() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    for sku in [5, 6, 7] {
        app.loms.stock(sku, 10);
        app.add(1, sku, 1).await.unwrap();
    }
    app.products.unknown(7);
    app.products.unknown(5);
    let metadata = refused(app.list(1).await, Code::NotFound, "PRODUCT_UNKNOWN");
    assert_eq!(metadata["skus"], "5, 7");
    app.finish().await;
}

#[tokio::test]
async fn listing_works_where_nothing_can_be_written() {
    let pool = crate::database().await;
    fill(&pool, 1, &(5..7)).await;
    // an owner may take rights from himself
    let revoke = "REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA checkout FROM CURRENT_USER";
    sqlx::raw_sql(revoke).execute(&pool).await.unwrap();
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 10);
    assert!(app.add(1, 5, 1).await.is_err(), "a write is refused");
    assert_eq!(app.cart(1).await, [(5, 1), (6, 1)]);
    assert_eq!(app.cart(2).await, [], "nobody has heard of this user");
    app.finish().await;
}

#[tokio::test]
async fn refusals_write_nothing() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    let listed = app.list(9).await.unwrap();
    assert_eq!((listed.items.len(), listed.total_price), (0, 0));
    refused(
        app.purchase(9).await,
        Code::FailedPrecondition,
        "EMPTY_CART",
    );
    refused(
        app.add(9, 5, 1).await,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    );
    let carts: i64 = sqlx::query_scalar("SELECT count(*) FROM checkout.cart")
        .fetch_one(&app.pool)
        .await
        .unwrap();
    assert_eq!(carts, 0);
    app.finish().await;
}

#[tokio::test]
async fn what_comes_too_late_for_its_caller_is_not_written() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 100);
    for user in 1..=3 {
        app.add(user, 5, 10).await.unwrap();
    }
    let mut tx = app.pool.begin().await.unwrap();
    let lock = "SELECT id FROM checkout.cart FOR UPDATE";
    sqlx::query(lock).execute(&mut *tx).await.unwrap();
    let call = async |path: &str, user: i64| {
        let body = json!({"user": user, "sku": 5, "count": 1});
        let wait = Some(Duration::from_millis(300));
        assert_eq!(app.code(path, body, wait).await, Code::DeadlineExceeded);
    };
    join3(
        call("/addToCart", 1),
        call("/deleteFromCart", 2),
        call("/purchase", 3),
    )
    .await;
    // their callers may send them again, so that now is too late
    tx.commit().await.unwrap();
    let pool = app.pool.clone();
    app.finish().await;
    let held = "SELECT user_id, count FROM checkout.cart
                JOIN checkout.cart_item ON cart_item.cart_id = cart.id ORDER BY user_id";
    let held: Vec<(i64, i64)> = sqlx::query_as(held).fetch_all(&pool).await.unwrap();
    assert_eq!(held, [(1, 10), (2, 10), (3, 10)]);
}

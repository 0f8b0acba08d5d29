//! Adding, deleting, listing.

use std::collections::BTreeMap;

use futures::{StreamExt as _, future::join_all, stream};
use sqlx::PgPool;
use tonic::Code;

use crate::{
    loms_stub::Mood,
    test_app::{TestApp, refused},
};

#[sqlx::test]
async fn a_cart_is_filled_listed_and_emptied(pool: PgPool) {
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

#[sqlx::test]
async fn a_unit_that_nobody_has_is_refused(pool: PgPool) {
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

#[sqlx::test]
async fn a_cart_has_room_for_65535_units_of_a_sku(pool: PgPool) {
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

#[sqlx::test]
async fn a_cart_has_room_for_1000_skus_and_all_of_them_are_ordered(pool: PgPool) {
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

#[sqlx::test]
async fn lines_of_an_open_purchase_take_room(pool: PgPool) {
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

#[sqlx::test]
async fn first_calls_that_come_together_share_one_cart_and_never_pass_the_stock(pool: PgPool) {
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 15);
    let added = join_all((0..20).map(|_| app.add(1, 5, 1))).await;
    assert_eq!(added.iter().filter(|answer| answer.is_ok()).count(), 15);
    for answer in added.into_iter().filter(Result::is_err) {
        refused(answer, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
    }
    assert_eq!(app.cart(1).await, [(5, 15)]);
    app.finish().await;
}

#[sqlx::test]
async fn many_calls_at_once_end_as_they_would_one_by_one(pool: PgPool) {
    let app = TestApp::start(pool).await;
    const SKUS: u32 = 2;
    let mut model: BTreeMap<(i64, u32), u32> = BTreeMap::new();
    for sku in 1..=SKUS {
        app.loms.stock(sku, 1_000);
    }
    for user in 1..=5 {
        for sku in 1..=SKUS {
            app.add(user, sku, 300).await.unwrap();
            model.insert((user, sku), 300);
        }
    }
    // sums that stay above zero and below the stock, so that every order of the calls ends the same
    let calls: Vec<_> = (0..400u32)
        .map(|n| {
            (
                i64::from(n % 5) + 1,
                n / 5 % SKUS + 1,
                n % 7 + 1,
                n % 3 == 0,
            )
        })
        .collect();
    for (user, sku, count, delete) in &calls {
        let units = model.get_mut(&(*user, *sku)).unwrap();
        *units = if *delete {
            *units - count
        } else {
            *units + count
        };
    }
    let play = |(user, sku, count, delete): (i64, u32, u32, bool)| {
        let app = &app;
        async move {
            if delete {
                app.delete(user, sku, count).await
            } else {
                app.add(user, sku, count).await
            }
        }
    };
    let playing = stream::iter(calls).map(play).buffer_unordered(32);
    playing.for_each(async |answer| answer.unwrap()).await;
    for user in 1..=5 {
        let expected: Vec<_> = (1..=SKUS).map(|sku| (sku, model[&(user, sku)])).collect();
        assert_eq!(app.cart(user).await, expected, "cart of {user}");
    }
    app.finish().await;
}

#[sqlx::test]
async fn a_total_that_does_not_fit_is_out_of_range(pool: PgPool) {
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 10);
    app.products.price(5, u32::MAX);
    app.add(1, 5, 1).await.unwrap();
    assert_eq!(app.list(1).await.unwrap().total_price, u32::MAX);
    app.add(1, 5, 1).await.unwrap();
    assert_eq!(app.list(1).await.unwrap_err().code(), Code::OutOfRange);
    app.finish().await;
}

#[sqlx::test]
async fn products_that_nobody_knows_are_named(pool: PgPool) {
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

#[sqlx::test]
async fn reading_writes_nothing(pool: PgPool) {
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

#[sqlx::test]
async fn adding_says_how_loms_is(pool: PgPool) {
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 10);
    let table = [
        (Mood::Away, Code::Unavailable),
        (Mood::Busy, Code::ResourceExhausted),
        (Mood::Broken, Code::Internal),
    ];
    for (mood, code) in table {
        app.loms.mood(mood);
        let status = app.add(1, 5, 1).await.unwrap_err();
        assert_eq!(status.code(), code, "{mood:?}");
        assert!(!status.message().contains("secret"), "{status:?}");
    }
    // UNAVAILABLE is tried again, the others are not
    assert_eq!(app.loms.stock_calls(), 3 + 1 + 1);
    app.loms.mood(Mood::Well);
    app.add(1, 5, 1).await.unwrap();
    app.finish().await;
}

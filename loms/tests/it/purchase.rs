//! The way of an order: stock arrives, is reserved, payed or put back; or is short.

use std::time::{Duration, SystemTime};

use proto::loms as pb;
use serde_json::json;

use crate::{
    oracle::{self, rows},
    test_app::{TestApp, instant},
};

fn steps(order: &pb::ListOrderResponse) -> Vec<(u32, &str, &str)> {
    order
        .history
        .iter()
        .map(|change| {
            (
                change.sequence,
                change.status.as_str(),
                change.actor.as_str(),
            )
        })
        .collect()
}

#[tokio::test]
async fn an_order_is_reserved_and_payed() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let again = app.receive("d1", &[(1, 7, 5), (2, 7, 3), (1, 8, 1)]).await;
    assert!(!again.unwrap());
    assert_eq!(app.stocks(7).await, [(1, 5), (2, 3)]);

    let created = app.create(42, &[(7, 4), (8, 1)]).await;
    assert_eq!(created.status, "awaiting payment");
    assert_eq!(created.shortages, []);
    // 4 of 7 fit into warehouse 1 alone, and 8 is sold out
    assert_eq!(app.stocks(7).await, [(1, 1), (2, 3)]);
    assert_eq!(app.stocks(8).await, []);

    let order = app.list(created.order_id).await;
    assert_eq!(
        (order.status.as_str(), order.user),
        ("awaiting payment", 42)
    );
    let items: Vec<_> = order
        .items
        .iter()
        .map(|item| (item.sku, item.count))
        .collect();
    assert_eq!(items, [(7, 4), (8, 1)]);
    assert_eq!(
        steps(&order),
        [(1, "new", "user"), (2, "awaiting payment", "user")]
    );
    let deadline = instant(order.payment_deadline);
    let left = deadline.duration_since(SystemTime::now()).unwrap();
    assert!(
        left > Duration::from_secs(590) && left <= Duration::from_secs(600),
        "{left:?}"
    );
    let placed = instant(order.history[0].at);
    assert!(placed.elapsed().unwrap_or_default() < Duration::from_secs(10));

    app.pay(created.order_id).await.unwrap();
    app.pay(created.order_id).await.unwrap();
    let order = app.list(created.order_id).await;
    assert_eq!(order.status, "payed");
    assert_eq!(order.payment_deadline, None);
    assert_eq!(steps(&order)[2..], [(3, "payed", "user")]);
    let sold: Vec<(i64, i64, i64)> = rows(
        &pool,
        "SELECT warehouse_id, sku, count FROM loms.write_off ORDER BY sku",
    )
    .await;
    assert_eq!(sold, [(1, 7, 4), (1, 8, 1)]);
    app.finish().await;
}

#[tokio::test]
async fn a_cancelled_order_gives_its_stock_back() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2), (2, 7, 2), (3, 7, 1)])
        .await
        .unwrap();
    let created = app.create(1, &[(7, 5)]).await;
    assert_eq!(created.status, "awaiting payment");
    assert_eq!(app.stocks(7).await, []);
    app.cancel(created.order_id).await.unwrap();
    app.cancel(created.order_id).await.unwrap();
    assert_eq!(app.stocks(7).await, [(1, 2), (2, 2), (3, 1)]);
    let order = app.list(created.order_id).await;
    assert_eq!(order.status, "cancelled");
    assert_eq!(steps(&order)[2..], [(3, "cancelled", "user")]);
    app.finish().await;
}

#[tokio::test]
async fn an_order_without_the_stock_is_failed_and_holds_nothing() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2), (2, 7, 1), (1, 8, 9)])
        .await
        .unwrap();
    let created = app.create(1, &[(9, 1), (8, 2), (7, 4)]).await;
    assert_eq!(created.status, "failed");
    let short = |sku, requested, available| pb::Shortage {
        sku,
        requested,
        available,
    };
    assert_eq!(created.shortages, [short(7, 4, 3), short(9, 1, 0)]);
    assert_eq!(app.stocks(7).await, [(1, 2), (2, 1)]);
    assert_eq!(app.stocks(8).await, [(1, 9)]);
    let order = app.list(created.order_id).await;
    assert_eq!(order.status, "failed");
    assert_eq!(order.payment_deadline, None);
    assert_eq!(steps(&order), [(1, "new", "user"), (2, "failed", "user")]);
    app.finish().await;
}

#[tokio::test]
async fn repeated_lines_are_one_line() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 5), (1, 7, 5), (1, 8, 1)])
        .await
        .unwrap();
    assert_eq!(app.stocks(7).await, [(1, 10)]);
    let created = app.create(1, &[(7, 3), (8, 1), (7, 4), (7, 3)]).await;
    assert_eq!(created.status, "awaiting payment");
    let items = app.list(created.order_id).await.items;
    let items: Vec<_> = items.iter().map(|item| (item.sku, item.count)).collect();
    assert_eq!(items, [(7, 10), (8, 1)]);
    // each line alone would find a unit; together they ask for two
    let short = app.create(1, &[(9, 1), (9, 1)]).await;
    assert_eq!(short.shortages[0].requested, 2);
    app.finish().await;
}

#[tokio::test]
async fn a_thousand_skus_in_one_order() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let highest = u32::MAX - 999;
    let lines: Vec<_> = (0..1000)
        .map(|n| (i64::from(n % 3) + 1, highest + n, 65_535))
        .collect();
    app.receive("d1", &lines).await.unwrap();
    let items: Vec<_> = (0..1000).rev().map(|n| (highest + n, 65_535)).collect();
    let created = app.create(1, &items).await;
    assert_eq!(created.status, "awaiting payment");
    assert_eq!(app.list(created.order_id).await.items.len(), 1000);
    let failed = app.create(1, &items).await;
    assert_eq!(
        (failed.status.as_str(), failed.shortages.len()),
        ("failed", 1000)
    );
    app.pay(created.order_id).await.unwrap();
    let left = oracle::count(&pool, "SELECT sum(count)::bigint FROM loms.stock").await;
    assert_eq!(left, 0);
    app.finish().await;
}

//! The recount finds what a hand has changed, each kind by its own line.

use futures::future::join_all;
use serde_json::json;

use crate::{
    oracle,
    test_app::{TestApp, eventually},
};

/// What is done to the tables, what undoes it, and what the audit must say.
const DRIFTS: [(&str, &str, &str); 16] = [
    (
        "UPDATE loms.stock SET count = count + 1 WHERE sku = 7",
        "UPDATE loms.stock SET count = count - 1 WHERE sku = 7",
        "stock: sku 7 warehouse 1: on sale 5 + reserved 1 + sold 1 is not received 6",
    ),
    (
        "UPDATE loms.delivery_line SET count = count + 1 WHERE sku = 7",
        "UPDATE loms.delivery_line SET count = count - 1 WHERE sku = 7",
        "stock: sku 7 warehouse 1: on sale 4 + reserved 1 + sold 1 is not received 7",
    ),
    (
        "DELETE FROM loms.stock WHERE sku = 8",
        "INSERT INTO loms.stock VALUES (1, 8, 3)",
        "stock: sku 8",
    ),
    (
        "UPDATE loms.reservation_stock SET count = 2",
        "UPDATE loms.reservation_stock SET count = 1",
        "order 1 (awaiting payment): sku 7: ordered 1, reserved 2, sold 0",
    ),
    (
        "UPDATE loms.reservation_stock SET order_id = 3",
        "UPDATE loms.reservation_stock SET order_id = 1",
        "order 3 (cancelled): sku 7: ordered 1, reserved 1, sold 0",
    ),
    (
        "UPDATE loms.reservation_stock SET order_id = 99",
        "UPDATE loms.reservation_stock SET order_id = 1",
        "order 99 (unknown)",
    ),
    (
        "UPDATE loms.write_off SET sku = 8",
        "UPDATE loms.write_off SET sku = 7",
        "order 2 (payed): sku 8: ordered 0, reserved 0, sold 1",
    ),
    (
        "UPDATE loms.user_order SET status = 'cancelled' WHERE id = 2",
        "UPDATE loms.user_order SET status = 'payed' WHERE id = 2",
        "order 2: status cancelled",
    ),
    (
        "UPDATE loms.user_order SET status = 'payed' WHERE id = 4",
        "UPDATE loms.user_order SET status = 'failed' WHERE id = 4",
        "order 4: status payed",
    ),
    (
        "UPDATE loms.status_change SET order_id = 99 WHERE order_id = 3 AND sequence = 1",
        "UPDATE loms.status_change SET order_id = 3 WHERE order_id = 99",
        "order 3: status cancelled, history {2,3}",
    ),
    (
        "UPDATE loms.user_order SET id = 97 WHERE id = 4",
        "UPDATE loms.user_order SET id = 4 WHERE id = 97",
        "order 4: status unknown, history {1,2}",
    ),
    (
        "UPDATE loms.order_item SET order_id = 98 WHERE order_id = 4",
        "UPDATE loms.order_item SET order_id = 4 WHERE order_id = 98",
        "order 4: status failed",
    ),
    (
        "UPDATE loms.unpaid_order SET order_id = 2",
        "UPDATE loms.unpaid_order SET order_id = 1",
        "order 1 (awaiting payment): payment deadline missing",
    ),
    (
        "INSERT INTO loms.unpaid_order VALUES (4, '2026-01-01')",
        "DELETE FROM loms.unpaid_order WHERE order_id = 4",
        "order 4 (unknown): payment deadline 2026",
    ),
    (
        "UPDATE loms.relay SET sent = sent - 1",
        "UPDATE loms.relay SET sent = sent + 1",
        "events: 10 steps of histories, but 9 sent + 0 waiting",
    ),
    (
        "INSERT INTO loms.outbox (order_id, sequence) VALUES (1, 2)",
        "DELETE FROM loms.outbox",
        "10 sent + 1 waiting",
    ),
];

#[tokio::test]
async fn every_kind_of_drift_is_found() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 6), (1, 8, 3)]).await.unwrap();
    for _ in 0..3 {
        app.create(1, &[(7, 1)]).await;
    }
    assert_eq!(app.create(1, &[(8, 9)]).await.order_id, 4);
    app.pay(2).await.unwrap();
    app.cancel(3).await.unwrap();
    let config = app.config.clone();
    app.finish().await;
    for (drift, undo, line) in DRIFTS {
        assert!(oracle::run(&pool, drift).await > 0, "{drift}");
        let report = loms::audit(&config).await.unwrap();
        let found = report
            .differences
            .iter()
            .any(|difference| difference.contains(line));
        assert!(found, "{drift}\nexpected {line}\n{report}");
        oracle::run(&pool, undo).await;
        let report = loms::audit(&config).await.unwrap();
        assert!(report.differences.is_empty(), "{undo}\n{report}");
    }
    let report = loms::audit(&config).await.unwrap();
    assert_eq!((report.orders, report.units_received), (4, 9));
}

#[tokio::test]
async fn an_event_that_vanishes_from_the_outbox_is_missed() {
    let pool = crate::database().await;
    // no such topic: the events stay
    let app = TestApp::start(
        &pool,
        json!({"kafka": {"topic": "nowhere"}, "outbox": {"broker_timeout": "100ms"}}),
    )
    .await;
    app.receive("d1", &[(1, 7, 6)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    let config = app.config.clone();
    assert!(loms::audit(&config).await.unwrap().differences.is_empty());
    app.stop().await.unwrap();
    let lost = "DELETE FROM loms.outbox WHERE id = (SELECT max(id) FROM loms.outbox)";
    assert_eq!(oracle::run(&pool, lost).await, 1);
    let report = loms::audit(&config).await.unwrap();
    assert_eq!(
        report.differences,
        ["events: 2 steps of histories, but 0 sent + 1 waiting"]
    );
}

#[tokio::test]
async fn an_audit_of_a_live_system_is_clean_and_blocks_nobody() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1000)]).await.unwrap();
    let trade = join_all((0..40).map(async |n| {
        let id = app.create(1 + n, &[(7, 1)]).await.order_id;
        match n % 3 {
            0 => app.pay(id).await.unwrap(),
            1 => app.cancel(id).await.unwrap(),
            _ => {
                let due =
                    "UPDATE loms.unpaid_order SET payment_deadline = now() WHERE order_id = $1";
                sqlx::query(due).bind(id).execute(&pool).await.unwrap();
            }
        }
    }));
    let audits = async {
        for _ in 0..15 {
            let report = loms::audit(&app.config).await.unwrap();
            assert!(report.differences.is_empty(), "{report}");
        }
    };
    tokio::join!(trade, audits);
    app.finish().await;
}

#[tokio::test]
async fn drift_shows_in_a_metric_without_anybody_asking() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"audit": {"every": "20ms", "sample": 50}})).await;
    app.receive("d1", &[(1, 7, 6), (2, 7, 1), (1, 9, 3)])
        .await
        .unwrap();
    let (held, payed) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    app.pay(payed).await.unwrap();
    let differences = async || {
        let metrics = app.get("/metrics").await.text;
        let found = metrics
            .lines()
            .find_map(|line| line.strip_prefix("loms_audit_differences "));
        found.expect("a metric").parse::<i64>().expect("a number")
    };
    let drifts = [
        (
            "UPDATE loms.stock SET count = count + 1 WHERE sku = 9",
            "UPDATE loms.stock SET count = count - 1 WHERE sku = 9",
        ),
        (
            "UPDATE loms.write_off SET count = count + 1",
            "UPDATE loms.write_off SET count = count - 1",
        ),
        (
            "UPDATE loms.delivery_line SET count = count + 1 WHERE warehouse_id = 2",
            "UPDATE loms.delivery_line SET count = count - 1 WHERE warehouse_id = 2",
        ),
        (
            "UPDATE loms.reservation_stock SET warehouse_id = 9",
            "UPDATE loms.reservation_stock SET warehouse_id = 2",
        ),
        (
            "UPDATE loms.order_item SET count = 2",
            "UPDATE loms.order_item SET count = 1",
        ),
        (
            "UPDATE loms.unpaid_order SET order_id = 99",
            "UPDATE loms.unpaid_order SET order_id = 1",
        ),
    ];
    assert_eq!(held, 1);
    for (drift, undo) in drifts {
        assert!(oracle::run(&pool, drift).await > 0, "{drift}");
        eventually(drift, async || differences().await > 0).await;
        oracle::run(&pool, undo).await;
        eventually(undo, async || differences().await == 0).await;
    }
    let metrics = app.get("/metrics").await.text;
    for kind in ["sku", "order"] {
        let counter = format!("loms_audit_checked_total{{kind=\"{kind}\"}} 0");
        assert!(!metrics.contains(&counter), "{counter}");
    }
    app.finish().await;
}

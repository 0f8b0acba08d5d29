//! What an operator can count on: every metric of the list is there when a service starts, and moves with the traffic.

use std::{collections::BTreeMap, fmt::Write as _};

use devstack::clients::Door;
use proto::cart::AddToCartRequest;
use serde_json::json;

use crate::test_stack::{TestStack, eventually};

const HEART: u32 = 85_123_001;

/// There from the start, with these labels.
const FROM_THE_START: [(Door, &[&str]); 3] = [
    (
        Door::Checkout,
        &[
            "checkout_counter_panics_total",
            "checkout_pool_connections{pool=\"checkout\",state=\"idle\"}",
            "checkout_pool_connections{pool=\"checkout\",state=\"in_use\"}",
            "checkout_pool_connections{pool=\"checkout-workers\",state=\"idle\"}",
            "checkout_pool_waiting{pool=\"checkout\"}",
            "checkout_gauge_purchases_open",
            "checkout_gauge_purchases_oldest_seconds",
        ],
    ),
    (
        Door::Loms,
        &[
            "loms_counter_panics_total",
            "loms_orders_total{status=\"new\"}",
            "loms_orders_total{status=\"awaiting payment\"}",
            "loms_orders_total{status=\"failed\"}",
            "loms_orders_total{status=\"payed\"}",
            "loms_orders_total{status=\"cancelled\"}",
            "loms_placement_batch_orders_count",
            "loms_placement_queue_orders",
            "loms_payment_batch_orders_count",
            "loms_payment_queue_orders",
            "loms_outbox_rows",
            "loms_outbox_oldest_age_seconds",
            "loms_outbox_sent_total",
            "loms_expiry_lateness_seconds_count",
            "loms_pool_connections{pool=\"loms\",state=\"idle\"}",
            "loms_pool_connections{pool=\"loms\",state=\"in_use\"}",
            "loms_pool_waiting{pool=\"loms\"}",
            "loms_audit_differences",
            "loms_audit_checked_total{kind=\"sku\"}",
            "loms_audit_checked_total{kind=\"order\"}",
            "loms_audit_failed_total",
        ],
    ),
    (
        Door::Notifications,
        &[
            "notifications_counter_panics_total",
            "notifications_consumer_partitions",
            "notifications_histogram_batch_size_count",
            "notifications_counter_saved_total",
            "notifications_counter_duplicates_total",
            "notifications_counter_dead_letters_total{cause=\"unreadable\"}",
            "notifications_counter_dead_letters_total{cause=\"refused\"}",
            "notifications_counter_dead_letters_total{cause=\"conflict\"}",
            "notifications_counter_deliveries_total{outcome=\"told\"}",
            "notifications_counter_deliveries_total{outcome=\"failed\"}",
            "notifications_counter_deliveries_total{outcome=\"given_up\"}",
            "notifications_pool_connections{pool=\"notifications\",state=\"idle\"}",
            "notifications_pool_waiting{pool=\"notifications-inbox\"}",
        ],
    ),
];

/// After one purchase and its payment, at least this much.
const AFTER_A_PURCHASE: [(Door, &[(&str, f64)]); 3] = [
    (
        Door::Checkout,
        &[
            (
                "checkout_histogram_response_time_seconds_count{method=\"/cart.Cart/Purchase\",status=\"OK\"}",
                1.0,
            ),
            (
                "checkout_histogram_response_time_seconds_count{method=\"/cart.Cart/ListCart\",status=\"InvalidArgument\"}",
                1.0,
            ),
            ("checkout_counter_requests_total{type=\"router\"}", 4.0),
            (
                "checkout_counter_outbound_calls_total{method=\"/loms.Loms/CreateOrder\",neighbour=\"loms\",status=\"OK\"}",
                1.0,
            ),
            (
                "checkout_counter_outbound_calls_total{method=\"/route256.product.ProductService/GetProduct\",neighbour=\"products\",status=\"OK\"}",
                1.0,
            ),
            (
                "checkout_counter_purchases_closed_total{outcome=\"made\"}",
                1.0,
            ),
        ],
    ),
    (
        Door::Loms,
        &[
            (
                "loms_histogram_response_time_seconds_count{method=\"/loms.Loms/CreateOrder\",status=\"OK\"}",
                1.0,
            ),
            (
                "loms_histogram_response_time_seconds_count{method=\"/loms.Loms/OrderPayed\",status=\"OK\"}",
                1.0,
            ),
            ("loms_counter_requests_total{type=\"router\"}", 3.0),
            ("loms_orders_total{status=\"new\"}", 1.0),
            ("loms_orders_total{status=\"awaiting payment\"}", 1.0),
            ("loms_orders_total{status=\"payed\"}", 1.0),
            ("loms_placement_batch_orders_count", 1.0),
            ("loms_outbox_sent_total", 3.0),
            ("loms_audit_checked_total{kind=\"sku\"}", 1.0),
            ("loms_audit_checked_total{kind=\"order\"}", 1.0),
            ("process_resident_memory_bytes", 1.0),
        ],
    ),
    (
        Door::Notifications,
        &[
            ("notifications_counter_saved_total", 3.0),
            ("notifications_histogram_batch_size_count", 1.0),
            (
                "notifications_counter_deliveries_total{outcome=\"told\"}",
                3.0,
            ),
            ("notifications_consumer_partitions", 1.0),
            (
                "notifications_pool_connections{pool=\"notifications-inbox\",state=\"idle\"}",
                1.0,
            ),
        ],
    ),
];

async fn scrape(stack: &TestStack, door: Door) -> BTreeMap<String, f64> {
    let answer = stack.clients.http.get(door, "/metrics").await.unwrap();
    let text = answer.body.as_str().unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

#[tokio::test]
async fn every_metric_is_there_and_moves() {
    let settings = json!({"loms": {"audit": {"every": "200ms"}}});
    let stack = TestStack::start_with(settings, &[(1, HEART, 9)]).await;
    let mut missing = String::new();
    for (door, names) in FROM_THE_START {
        let metrics = scrape(&stack, door).await;
        for name in names.iter().filter(|name| !metrics.contains_key(**name)) {
            writeln!(missing, "{name}").unwrap();
        }
    }
    assert!(missing.is_empty(), "not there from the start:\n{missing}");

    let mut cart = stack.clients.cart.clone();
    let added = AddToCartRequest {
        user: 3,
        sku: HEART,
        count: 1,
    };
    cart.add_to_cart(added).await.unwrap();
    let post = async |door, path, body| {
        let answer = stack.clients.http.post(door, path, &body).await.unwrap();
        answer.body
    };
    post(Door::Checkout, "/listCart", json!({"user": 3})).await;
    post(Door::Checkout, "/listCart", json!({"user": 0})).await;
    let bought = post(Door::Checkout, "/purchase", json!({"user": 3})).await;
    post(
        Door::Loms,
        "/orderPayed",
        json!({"orderID": bought["orderID"]}),
    )
    .await;

    for (door, wanted) in AFTER_A_PURCHASE {
        eventually(&format!("{wanted:?}"), async || {
            let metrics = scrape(&stack, door).await;
            let counted = |name: &str| metrics.get(name).copied().unwrap_or(-1.0);
            wanted.iter().all(|(name, least)| counted(name) >= *least)
        })
        .await;
    }
    // how far behind the consumer is, of each partition it has, and nothing is left behind
    eventually("no lag", async || {
        let metrics = scrape(&stack, Door::Notifications).await;
        let lag = |(name, _): &(&String, &f64)| name.starts_with("notifications_consumer_lag{");
        let lags: Vec<_> = metrics.iter().filter(lag).map(|(_, lag)| *lag).collect();
        !lags.is_empty() && lags.iter().all(|lag| *lag == 0.0)
    })
    .await;
    let loms = scrape(&stack, Door::Loms).await;
    assert_eq!(loms["loms_audit_differences"], 0.0);
    // a label that a caller could choose would fill the memory of whoever collects
    let unknown = stack
        .clients
        .http
        .post(Door::Loms, "/nothing", &json!({}))
        .await;
    assert_eq!(unknown.unwrap().status, 404);
    let metrics = scrape(&stack, Door::Loms).await;
    assert!(metrics.keys().all(|name| !name.contains("nothing")));
    stack.finish().await;
}

//! What an operator reads in `/metrics` about products and purchases.

use std::time::Duration;

use futures::future::join_all;
use proto::cart::ListCartRequest;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    loms_stub::Mood,
    process::Process,
    test_app::{Neighbours, config, connect, eventually, fill, purchase_request},
};

#[tokio::test]
async fn lookups_are_hits_misses_or_shared_and_waits_are_measured() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    for user in 1..=4 {
        fill(&pool, user, &(5..20)).await;
    }
    let process = Process::start(&config(&pool, neighbours.addresses, &json!({})));
    let client = connect(process.grpc).await;
    let list = async |user: i64| {
        let request = ListCartRequest { user };
        client.clone().list_cart(request).await.unwrap();
    };
    let lookups = async |result: &str| {
        let name = format!("checkout_counter_product_lookups_total{{result=\"{result}\"}}");
        process.metric(&name).await
    };
    // four callers of the same 15 products: each is asked for once
    join_all((1..=4).map(list)).await;
    assert_eq!(lookups("miss").await, 15.0);
    assert_eq!(lookups("hit").await + lookups("shared").await, 45.0);
    let hits = lookups("hit").await;
    list(1).await;
    assert_eq!(lookups("hit").await, hits + 15.0);
    // five more than a second allows
    let waited = process.metric("checkout_product_wait_seconds_sum").await;
    assert!(waited > 0.9, "{waited} s");
    assert!(process.metric("checkout_product_wait_seconds_count").await >= 15.0);
    let answered = r#"checkout_counter_outbound_calls_total{method="/route256.product.ProductService/GetProduct",neighbour="products",status="OK"}"#;
    assert_eq!(process.metric(answered).await, 15.0);
}

#[tokio::test]
async fn open_purchases_and_the_age_of_the_oldest_are_shown() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    fill(&pool, 1, &(5..6)).await;
    fill(&pool, 2, &(5..6)).await;
    neighbours.loms.stock(5, 10);
    neighbours.loms.mood(Mood::Away);
    let process = Process::start(&config(&pool, neighbours.addresses, &json!({})));
    let began = Instant::now();
    for user in [1, 2] {
        let mut client = connect(process.grpc).await;
        client
            .purchase(purchase_request(user, ""))
            .await
            .unwrap_err();
    }
    let (open, oldest) = (
        "checkout_gauge_purchases_open",
        "checkout_gauge_purchases_oldest_seconds",
    );
    eventually("two are open, and one of them for a while", async || {
        process.metric(open).await == 2.0 && process.metric(oldest).await > 0.5
    })
    .await;
    let age = process.metric(oldest).await;
    assert!(
        age < (began.elapsed() + Duration::from_secs(1)).as_secs_f64(),
        "{age} s"
    );
    neighbours.loms.mood(Mood::Well);
    eventually("none is open", async || {
        process.metric(open).await == 0.0 && process.metric(oldest).await == 0.0
    })
    .await;
    let made = r#"checkout_counter_purchases_closed_total{outcome="made"}"#;
    assert_eq!(process.metric(made).await, 2.0);
}

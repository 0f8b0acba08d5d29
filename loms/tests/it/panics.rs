//! A panic in a batch of the placer: those who were in it hear INTERNAL, those after them get their orders.

use serde_json::json;
use tonic::Code;

use crate::{
    kafka, oracle,
    process::{self, Process},
    test_app::order,
};

#[tokio::test]
async fn a_panic_in_a_batch_is_a_failed_batch() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let config = process::config(
        &pool,
        &topic,
        &json!({"admin": {"allow_unauthenticated": true}}),
    );
    // the first batch panics with its transaction open, the second after its commit
    let points = "order-placing=1*panic->off;order-placed=1*panic->off";
    let process = Process::start_with(&config, points).await;
    let mut loms = process.client();
    for made in [0, 1] {
        let failed = loms
            .create_order(order(1, &[(7, 1)], ""))
            .await
            .unwrap_err();
        assert_eq!(failed.code(), Code::Internal, "{failed:?}");
        let orders = oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await;
        assert_eq!(orders, made, "what was not committed is not there");
    }
    let created = loms.create_order(order(1, &[(7, 1)], "")).await.unwrap();
    assert_eq!(created.into_inner().status, "failed", "there is no stock");
    assert!(process.stop().await.success());
}

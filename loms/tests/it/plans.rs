//! How the workers' statements are planned: once, often while the tables are still empty.

use serde_json::json;
use sqlx::PgPool;

use crate::{
    oracle,
    test_app::{TestApp, eventually},
};

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn workers_read_by_index_however_small_the_tables(pool: PgPool) {
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    for user in 1..=20 {
        let order = app.create(user, &[(7, 1)]).await.order_id;
        app.pay(order).await.unwrap();
    }
    eventually("events that have left", async || {
        oracle::count(&pool, "SELECT count(*) FROM loms.outbox").await == 0
    })
    .await;
    let reads = |by: &str| {
        format!(
            "SELECT coalesce(sum({by}), 0)::bigint FROM pg_stat_user_tables
             WHERE schemaname = 'loms' AND relname IN ('user_order', 'status_change', 'unpaid_order')"
        )
    };
    // the relay alone looks a history up for each of sixty events
    let by_index = reads("idx_scan");
    eventually("PostgreSQL has counted the reads", async || {
        let counted: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(by_index.clone()))
            .fetch_one(&pool)
            .await
            .unwrap();
        counted >= 60
    })
    .await;
    let whole: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(reads("seq_scan")))
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(whole, 0, "whole tables were read");
    app.finish().await;
}

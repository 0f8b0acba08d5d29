//! How the workers' statements are planned: once, often while the tables are still empty.

use serde_json::json;
use sqlx::{PgPool, Row as _};

use crate::test_app::{TestApp, eventually};

/// Reads of the tables that grow with each order: by index, and of whole tables.
async fn reads(pool: &PgPool) -> (i64, i64) {
    let statement = "SELECT coalesce(sum(idx_scan), 0)::bigint, coalesce(sum(seq_scan), 0)::bigint
        FROM pg_stat_user_tables
        WHERE schemaname = 'loms' AND relname IN ('user_order', 'status_change', 'unpaid_order')";
    let row = sqlx::query(statement).fetch_one(pool).await.unwrap();
    (row.get(0), row.get(1))
}

/// Places and pays orders, and waits until PostgreSQL has counted the reads that this took; returns those of whole tables.
async fn trade(app: &TestApp, pool: &PgPool) -> i64 {
    let (before, _) = reads(pool).await;
    for user in 1..=20 {
        let order = app.create(user, &[(7, 1)]).await.order_id;
        app.pay(order).await.unwrap();
    }
    // the relay alone looks up the order and the step of each of sixty events
    eventually("PostgreSQL has counted the reads", async || {
        reads(pool).await.0 >= before + 120
    })
    .await;
    reads(pool).await.1
}

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn workers_read_by_index_however_small_the_tables(pool: PgPool) {
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    // the migrations have read whole tables, to build their indexes
    let first = trade(&app, &pool).await;
    let then = trade(&app, &pool).await;
    assert_eq!(then, first, "whole tables were read");
    app.finish().await;
}

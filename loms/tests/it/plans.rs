//! How the workers' statements are planned: once, often while the tables are still empty.

use futures::future::join_all;
use serde_json::json;
use sqlx::{PgPool, Row as _};

use crate::{
    oracle,
    test_app::{TestApp, eventually},
};

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

#[tokio::test]
async fn workers_read_by_index_however_small_the_tables() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    // the migrations have read whole tables, to build their indexes
    let first = trade(&app, &pool).await;
    let then = trade(&app, &pool).await;
    assert_eq!(then, first, "whole tables were read");
    app.finish().await;
}

/// A figure of PostgreSQL's own about a table, or an index.
async fn counted(pool: &PgPool, statement: &'static str) -> i64 {
    sqlx::query_scalar(statement).fetch_one(pool).await.unwrap()
}

const DEADLINES_READ: &str =
    "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'unpaid_order'";
const ORDERS_READ: &str =
    "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'user_order'";

/// Waits until PostgreSQL has counted ten more sweeps: each that finds nothing asks for the first deadline.
async fn ten_sweeps(pool: &PgPool) {
    let scans = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'unpaid_order_payment_deadline_idx'";
    let before = counted(pool, scans).await;
    eventually("ten sweeps", async || {
        counted(pool, scans).await >= before + 10
    })
    .await;
}

/// A shop of thousands of orders a minute has a million that may still be payed, and many times more that are payed: to
/// find the few that are due must not read them all.
#[tokio::test]
async fn a_sweep_reads_what_is_due_and_nothing_else() {
    let pool = crate::database().await;
    const WAITING: i64 = 300;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1_000)]).await.unwrap();
    let goods = [(7, 1)];
    join_all((1..=WAITING).map(|user| app.create(user, &goods))).await;
    ten_sweeps(&pool).await;

    let before = counted(&pool, DEADLINES_READ).await;
    ten_sweeps(&pool).await;
    let read = counted(&pool, DEADLINES_READ).await - before;
    assert!(read < WAITING, "{read} deadlines, and nothing is due");

    let before = counted(&pool, ORDERS_READ).await;
    let due = "UPDATE loms.unpaid_order SET payment_deadline = now()
               WHERE order_id = (SELECT max(order_id) FROM loms.unpaid_order)";
    oracle::run(&pool, due).await;
    let unpaid = "SELECT count(*) FROM loms.unpaid_order";
    eventually("it is cancelled", async || {
        counted(&pool, unpaid).await == WAITING - 1
    })
    .await;
    ten_sweeps(&pool).await;
    let read = counted(&pool, ORDERS_READ).await - before;
    assert!(read < WAITING, "{read} orders, and one was due");
    app.finish().await;
}

/// The history of what was sold only grows. The sampled audit adds up all of it for its SKUs: what it adds up is in an index,
/// not on a page of its own for each order.
#[tokio::test]
async fn a_sample_of_the_audit_leaves_the_table_of_write_offs_alone() {
    let pool = crate::database().await;
    let sold = r"INSERT INTO loms.delivery (id, content_hash) VALUES ('d1', '\x00');
        INSERT INTO loms.delivery_line SELECT 'd1', 1, sku, 100 FROM generate_series(1, 200) AS sku;
        INSERT INTO loms.stock SELECT 1, sku, 0 FROM generate_series(1, 200) AS sku;
        INSERT INTO loms.write_off (order_id, warehouse_id, sku, count)
        SELECT id, 1, 1 + id % 200, 1 FROM generate_series(1, 20000) AS id";
    sqlx::raw_sql(sold).execute(&pool).await.unwrap();
    // a page is seen to be visible to all only when no older snapshot is open, such as that of an
    // autovacuum worker
    eventually("a table that is visible to all", async || {
        let vacuum = sqlx::raw_sql("VACUUM (ANALYZE) loms.write_off");
        vacuum.execute(&pool).await.unwrap();
        let hidden = "SELECT (relpages - relallvisible)::bigint FROM pg_class
                      WHERE oid = 'loms.write_off'::regclass";
        counted(&pool, hidden).await == 0
    })
    .await;
    let scans =
        "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'write_off_sku_idx'";
    let read =
        "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_user_tables WHERE relname = 'write_off'";
    let before = (counted(&pool, scans).await, counted(&pool, read).await);

    let audit = json!({"audit": {"every": "20ms", "sample": 2}});
    let app = TestApp::start(&pool, audit).await;
    eventually("ten samples", async || {
        counted(&pool, scans).await >= before.0 + 10
    })
    .await;
    assert_eq!(counted(&pool, read).await, before.1, "rows were fetched");
    // no order has sold these: the whole audit would say so
    app.stop().await.unwrap();
}

//! What statements read: the rows they need, however many there are beside.

use std::time::Duration;

use checkout::{
    purchase::Found,
    store::{purchases::find_last, recovery::sweep_closed},
};
use platform::{
    config::PostgresConfig,
    pg::{self, Db},
};
use serde_json::json;
use sqlx::{ConnectOptions as _, PgPool};
use uuid::Uuid;

/// Rows of purchases that this transaction has read.
async fn rows_read(conn: &mut Db) -> i64 {
    let read = "SELECT (coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint
                FROM pg_stat_xact_user_tables WHERE relid = 'checkout.purchase'::regclass";
    sqlx::query_scalar(read).fetch_one(conn).await.unwrap()
}

/// A connection as the service's stores have it.
async fn connect(pool: &PgPool) -> Db {
    let url = pool.connect_options().to_url_lossy().to_string();
    let config: PostgresConfig = serde_json::from_value(json!({"connection_string": url})).unwrap();
    pg::connect_as(&config, "checkout-plans").await.unwrap()
}

/// The last purchase, and how many rows were read to find it.
async fn last(pool: &PgPool, cart_id: i64) -> (Found, i64) {
    let mut db = connect(pool).await;
    let mut tx = db.begin().await.unwrap();
    let before = rows_read(&mut tx).await;
    let found = find_last(&mut tx, cart_id).await.unwrap().unwrap();
    (found, rows_read(&mut tx).await - before)
}

/// Purchases of user 1, one every two minutes into the past, all closed; returns the cart.
async fn buy_for_a_week(pool: &PgPool) -> i64 {
    let cart = "INSERT INTO checkout.cart (user_id) VALUES (1) RETURNING id";
    let cart: i64 = sqlx::query_scalar(cart).fetch_one(pool).await.unwrap();
    let week = "INSERT INTO checkout.purchase
                    (cart_id, created_at, next_attempt_at, closed_at, outcome, order_id, told)
                SELECT $1, at, at, at, 'made', n, true
                FROM generate_series(1, 5000) AS n, LATERAL (SELECT clock_timestamp() - n * interval '2 minutes') AS bought(at)";
    let week = sqlx::query(week).bind(cart);
    week.execute(pool).await.unwrap();
    sqlx::query("ANALYZE").execute(pool).await.unwrap();
    cart
}

#[tokio::test]
async fn a_sweep_of_closed_purchases_reads_those_that_are_old() {
    let pool = crate::database().await;
    buy_for_a_week(&pool).await;
    let mut db = connect(&pool).await;
    let mut tx = db.begin().await.unwrap();
    for (days, swept) in [(8, 0), (6, 100)] {
        let before = rows_read(&mut tx).await;
        let keep = Duration::from_secs(days * 24 * 60 * 60);
        assert_eq!(sweep_closed(&mut tx, keep, 100).await.unwrap(), swept);
        let read = rows_read(&mut tx).await - before;
        // looked up by age, and by id to be deleted
        assert!(read <= 3 * swept as i64, "{days} days: {read} rows");
    }
}

#[tokio::test]
async fn the_last_of_thousands_of_purchases_is_found_by_a_few_rows() {
    let pool = crate::database().await;
    let cart = buy_for_a_week(&pool).await;
    let newest = "SELECT id FROM checkout.purchase WHERE order_id = 1";
    let newest: Uuid = sqlx::query_scalar(newest).fetch_one(&pool).await.unwrap();
    let (found, read) = last(&pool, cart).await;
    assert!(
        found.id == newest && found.closed && found.told,
        "{found:?}"
    );
    assert!(read <= 10, "{read} rows");

    // the last, whatever the clock said when it began
    let open = "INSERT INTO checkout.purchase (cart_id, created_at, next_attempt_at)
                SELECT $1, clock_timestamp() - interval '1 day', clock_timestamp() RETURNING id";
    let open = sqlx::query_scalar(open).bind(cart);
    let open: Uuid = open.fetch_one(&pool).await.unwrap();
    let (found, read) = last(&pool, cart).await;
    assert!(found.id == open && !found.closed, "{found:?}");
    assert!(read <= 10, "{read} rows");
}

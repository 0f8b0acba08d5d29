//! Orders that were payed long ago, written by SQL: how the cost of a load grows with what is in the tables.

use anyhow::{Context as _, Result};
use sqlx::PgConnection;

use super::{calls::USERS, skus::Skus};

/// Orders of one statement.
const CHUNK: i64 = 100_000;

/// Writes `orders` orders of three lines of a unit each, as the service would have: payed, their events sent, their units
/// delivered, their keys still known. The audit holds for them as for all others.
pub(super) async fn fill(db: &mut PgConnection, orders: i64, skus: &Skus) -> Result<()> {
    let (first, many) = skus.range();
    anyhow::ensure!(many >= 3, "orders of three lines need three SKUs");
    for from in (1..=orders).step_by(CHUNK as usize) {
        let until = (from + CHUNK - 1).min(orders);
        sqlx::raw_sql(sqlx::AssertSqlSafe(chunk(from, until, first, many)))
            .execute(&mut *db)
            .await
            .with_context(|| format!("fill in the orders from {from}"))?;
    }
    sqlx::raw_sql(
        "SELECT setval('loms.user_order_id_seq', (SELECT max(id) FROM loms.user_order));
         INSERT INTO loms.delivery (id, content_hash) VALUES ('filled', '');
         INSERT INTO loms.delivery_line (delivery_id, warehouse_id, sku, count)
         SELECT 'filled', warehouse_id, sku, sum(count) FROM loms.write_off GROUP BY warehouse_id, sku;",
    )
    .execute(&mut *db)
    .await?;
    sqlx::raw_sql("VACUUM ANALYZE").execute(&mut *db).await?;
    sqlx::raw_sql("CHECKPOINT").execute(db).await?;
    Ok(())
}

/// The orders `from` to `until`.
fn chunk(from: i64, until: i64, first: u32, many: u32) -> String {
    format!(
        "BEGIN;
         CREATE TEMPORARY TABLE filled ON COMMIT DROP AS
         SELECT n AS id, 1 + n % {USERS} AS user_id, now() - interval '1 day' AS at FROM generate_series({from}, {until}) AS n;
         CREATE TEMPORARY TABLE line ON COMMIT DROP AS
         SELECT id, {first} + (id + k * ({many} / 3)) % {many} AS sku, at FROM filled CROSS JOIN generate_series(0, 2) AS k;
         INSERT INTO loms.user_order (id, user_id, status, created_at) SELECT id, user_id, 'payed', at FROM filled;
         INSERT INTO loms.order_item (order_id, sku, count) SELECT id, sku, 1 FROM line;
         INSERT INTO loms.write_off (order_id, warehouse_id, sku, count, at) SELECT id, 1, sku, 1, at FROM line;
         INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor, at)
         SELECT id, 1, NULL::loms.order_status, 'new'::loms.order_status, 'user', at FROM filled UNION ALL
         SELECT id, 2, 'new', 'awaiting payment', 'user', at FROM filled UNION ALL
         SELECT id, 3, 'awaiting payment', 'payed', 'user', at FROM filled;
         INSERT INTO loms.idempotency_key (user_id, key, body_hash, order_id, created_at)
         SELECT user_id, md5(id::text), sha256(id::text::bytea), id, at FROM filled;
         UPDATE loms.relay SET sent = sent + 3 * (SELECT count(*) FROM filled);
         COMMIT;"
    )
}

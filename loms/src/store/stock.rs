//! Stock on sale, and deliveries.

use platform::pg::Db;

use super::units;
use crate::{
    delivery::Delivery,
    order::{Sku, WarehouseId},
};

/// Units on sale by warehouse; those with none are left out.
pub(crate) async fn read_stock(db: &mut Db, sku: Sku) -> sqlx::Result<Vec<(WarehouseId, u64)>> {
    let rows = sqlx::query!(
        "SELECT warehouse_id, count FROM loms.stock WHERE sku = $1 AND count > 0 ORDER BY warehouse_id",
        sku.db()
    )
    .fetch_all(db)
    .await?;
    let mut stock = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(warehouse) = WarehouseId::new(row.warehouse_id) {
            stock.push((warehouse, units(row.count)?));
        }
    }
    Ok(stock)
}

/// Claims a delivery id. `false`: it was received before, perhaps with other lines.
pub(crate) async fn claim_delivery(db: &mut Db, delivery: &Delivery) -> sqlx::Result<bool> {
    let claimed = sqlx::query!(
        "INSERT INTO loms.delivery (id, content_hash) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        delivery.id(),
        &delivery.content_hash()
    )
    .execute(db)
    .await?;
    Ok(claimed.rows_affected() == 1)
}

/// What was received under this id before.
pub(crate) async fn read_delivery_hash(db: &mut Db, id: &str) -> sqlx::Result<Vec<u8>> {
    sqlx::query_scalar!("SELECT content_hash FROM loms.delivery WHERE id = $1", id)
        .fetch_one(db)
        .await
}

/// Books the lines of a delivery and puts their units on sale.
pub(crate) async fn insert_delivery_lines(db: &mut Db, delivery: &Delivery) -> sqlx::Result<()> {
    let (mut warehouses, mut skus, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for (sku, warehouse, count) in delivery.lines() {
        warehouses.push(warehouse.get());
        skus.push(sku.db());
        counts.push(count.cast_signed());
    }
    // the upsert takes row locks too, so it is sorted like every other
    sqlx::query!(
        r#"WITH lines AS MATERIALIZED (
               SELECT l.warehouse_id, l.sku, l.count
               FROM UNNEST($2::bigint[], $3::bigint[], $4::bigint[]) AS l (warehouse_id, sku, count)
           ), kept AS (
               INSERT INTO loms.delivery_line (delivery_id, warehouse_id, sku, count)
               SELECT $1, warehouse_id, sku, count FROM lines
           )
           INSERT INTO loms.stock AS s (warehouse_id, sku, count)
           SELECT warehouse_id, sku, count FROM lines ORDER BY sku, warehouse_id
           ON CONFLICT ON CONSTRAINT stock_pkey DO UPDATE SET count = s.count + excluded.count"#,
        delivery.id(),
        &warehouses,
        &skus,
        &counts
    )
    .execute(db)
    .await?;
    Ok(())
}

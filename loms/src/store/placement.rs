//! What a batch of new orders reads and writes. Arrays travel as one parameter each and are unfolded by UNNEST.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use platform::pg::Db;

use super::{sku, status, units};
use crate::{
    allocation::{Allocation, Shelves, Shortage},
    order::{Lines, OrderId, Sku, Status, UserId, WarehouseId},
};

/// An order as the batch decided it.
pub(crate) struct DecidedOrder<'a> {
    pub(crate) id: OrderId,
    pub(crate) user: UserId,
    pub(crate) status: Status,
    pub(crate) lines: &'a Lines,
    pub(crate) traceparent: Option<&'a str>,
}

/// Numbers for new orders. A number whose order is not written stays unused.
pub(crate) async fn draw_order_ids(db: &mut Db, count: usize) -> sqlx::Result<Vec<OrderId>> {
    let ids = sqlx::query_scalar!(
        r#"SELECT nextval('loms.user_order_id_seq') AS "id!" FROM generate_series(1, $1::bigint)"#,
        count as i64
    )
    .fetch_all(db)
    .await?;
    Ok(ids.into_iter().map(OrderId).collect())
}

/// What is on sale of `skus`, locked until the end of the transaction.
pub(crate) async fn lock_shelves(db: &mut Db, skus: &[Sku]) -> sqlx::Result<Shelves> {
    let skus: Vec<i64> = skus.iter().map(|sku| sku.db()).collect();
    // by (sku, warehouse_id), as everybody locks stock: unsorted locks deadlock
    let rows = sqlx::query!(
        r#"SELECT sku, warehouse_id, count FROM loms.stock
           WHERE sku = ANY($1) ORDER BY sku, warehouse_id FOR NO KEY UPDATE"#,
        &skus
    )
    .fetch_all(db)
    .await?;
    let mut shelves = Shelves::default();
    for row in rows {
        if let Some(warehouse) = WarehouseId::new(row.warehouse_id) {
            shelves.put(sku(row.sku)?, warehouse, units(row.count)?);
        }
    }
    Ok(shelves)
}

/// Those of `skus` that somebody else has locked a row of, without waiting for him.
pub(crate) async fn find_held_skus(db: &mut Db, skus: &[Sku]) -> sqlx::Result<BTreeSet<Sku>> {
    let skus: Vec<i64> = skus.iter().map(|sku| sku.db()).collect();
    let held = sqlx::query_scalar!(
        r#"WITH free AS (
               SELECT sku, warehouse_id FROM loms.stock WHERE sku = ANY($1) FOR NO KEY UPDATE SKIP LOCKED
           )
           SELECT s.sku FROM loms.stock s LEFT JOIN free f ON f.sku = s.sku AND f.warehouse_id = s.warehouse_id
           WHERE s.sku = ANY($1) AND f.sku IS NULL"#,
        &skus
    )
    .fetch_all(db)
    .await?;
    held.into_iter().map(sku).collect()
}

/// Writes orders with their items, histories (`new`, then what was decided), deadlines and events, and moves what they
/// take from the shelves, which the caller has locked, into reservations. One statement: each costs a round trip, and
/// the next batch waits for all of them.
#[expect(
    clippy::too_many_lines,
    reason = "it is one statement, and its columns"
)]
pub(crate) async fn insert_orders(
    db: &mut Db,
    orders: &[DecidedOrder<'_>],
    taken: &[(OrderId, Allocation)],
    payment_timeout: Duration,
) -> sqlx::Result<()> {
    let ids: Vec<i64> = orders.iter().map(|order| order.id.0).collect();
    let users: Vec<i64> = orders.iter().map(|order| order.user.get()).collect();
    let statuses: Vec<&str> = orders.iter().map(|order| order.status.as_str()).collect();
    let traces: Vec<Option<&str>> = orders.iter().map(|order| order.traceparent).collect();
    let items = columns(orders.iter().flat_map(|order| {
        let lines = order.lines.iter();
        lines.map(|(sku, quantity)| [order.id.0, sku.db(), i64::from(quantity.get())])
    }));
    let parts = columns(taken.iter().map(|(order, part)| {
        let units = part.units.cast_signed();
        [order.0, part.warehouse.get(), part.sku.db(), units]
    }));
    // outbox ids are drawn by the INSERT, after the sort: the relay sends by id, and must not meet 2 before 1
    sqlx::query!(
        r#"WITH placed AS MATERIALIZED (
               SELECT p.id, p.user_id, p.status, p.traceparent
               FROM UNNEST($1::bigint[], $2::bigint[], $3::text[]::loms.order_status[], $4::text[])
                    AS p (id, user_id, status, traceparent)
           ), orders AS (
               INSERT INTO loms.user_order (id, user_id, status) SELECT id, user_id, status FROM placed
           ), items AS (
               INSERT INTO loms.order_item (order_id, sku, count)
               SELECT * FROM UNNEST($6::bigint[], $7::bigint[], $8::bigint[])
           ), taken AS MATERIALIZED (
               SELECT t.order_id, t.warehouse_id, t.sku, t.count
               FROM UNNEST($9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[])
                    AS t (order_id, warehouse_id, sku, count)
           ), reserved AS (
               INSERT INTO loms.reservation_stock (order_id, warehouse_id, sku, count)
               SELECT order_id, warehouse_id, sku, count FROM taken
           ), shelves AS (
               UPDATE loms.stock s SET count = s.count - t.count
               FROM (SELECT warehouse_id, sku, sum(count)::bigint AS count FROM taken GROUP BY warehouse_id, sku) AS t
               WHERE s.sku = t.sku AND s.warehouse_id = t.warehouse_id
           ), history AS (
               INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor)
               SELECT id, 1, NULL, 'new'::loms.order_status, 'user' FROM placed
               UNION ALL
               SELECT id, 2, 'new'::loms.order_status, status, 'user' FROM placed
           ), unpaid AS (
               INSERT INTO loms.unpaid_order (order_id, payment_deadline)
               SELECT id, now() + make_interval(secs => $5) FROM placed WHERE status = 'awaiting payment'
           )
           INSERT INTO loms.outbox (order_id, sequence, traceparent)
           SELECT placed.id, step.sequence, placed.traceparent
           FROM placed CROSS JOIN (VALUES (1), (2)) AS step (sequence)
           ORDER BY placed.id, step.sequence"#,
        &ids,
        &users,
        &statuses as &[&str],
        &traces as &[Option<&str>],
        payment_timeout.as_secs_f64(),
        &items[0],
        &items[1],
        &items[2],
        &parts[0],
        &parts[1],
        &parts[2],
        &parts[3]
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Rows turned into the arrays that UNNEST takes.
pub(super) fn columns<const N: usize>(rows: impl Iterator<Item = [i64; N]>) -> [Vec<i64>; N] {
    let mut columns = [const { Vec::new() }; N];
    for row in rows {
        for (column, value) in columns.iter_mut().zip(row) {
            column.push(value);
        }
    }
    columns
}

/// Keeps what was missing of failed orders.
pub(crate) async fn insert_shortages(
    db: &mut Db,
    short: &[(OrderId, Shortage)],
) -> sqlx::Result<()> {
    let short = columns(short.iter().map(|(order, line)| {
        let (requested, available) = (line.requested.cast_signed(), line.available.cast_signed());
        [order.0, line.sku.db(), requested, available]
    }));
    sqlx::query!(
        r#"INSERT INTO loms.order_shortage (order_id, sku, requested, available)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[])"#,
        &short[0],
        &short[1],
        &short[2],
        &short[3]
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The present status of orders that earlier calls made.
pub(crate) async fn read_statuses(
    db: &mut Db,
    orders: &[OrderId],
) -> sqlx::Result<HashMap<OrderId, Status>> {
    let ids: Vec<i64> = orders.iter().map(|order| order.0).collect();
    let rows = sqlx::query!(
        r#"SELECT id, status::text AS "status!" FROM loms.user_order WHERE id = ANY($1)"#,
        &ids
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| Ok((OrderId(row.id), status(&row.status)?)))
        .collect()
}

/// What was missing of orders that failed before, by SKU.
pub(crate) async fn read_shortages(
    db: &mut Db,
    orders: &[OrderId],
) -> sqlx::Result<HashMap<OrderId, Vec<Shortage>>> {
    let ids: Vec<i64> = orders.iter().map(|order| order.0).collect();
    let rows = sqlx::query!(
        r#"SELECT order_id, sku, requested, available FROM loms.order_shortage
           WHERE order_id = ANY($1) ORDER BY order_id, sku"#,
        &ids
    )
    .fetch_all(db)
    .await?;
    let mut shortages: HashMap<OrderId, Vec<Shortage>> = HashMap::new();
    for row in rows {
        let shortage = Shortage {
            sku: sku(row.sku)?,
            requested: units(row.requested)?,
            available: units(row.available)?,
        };
        shortages
            .entry(OrderId(row.order_id))
            .or_default()
            .push(shortage);
    }
    Ok(shortages)
}

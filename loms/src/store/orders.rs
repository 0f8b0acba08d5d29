//! Orders that exist: reading one, and settling those that await payment.

use std::{collections::HashMap, time::Duration};

use platform::pg::Db;
use time::OffsetDateTime;

use super::{sku, status};
use crate::order::{Actor, OrderId, Sku, Status};

/// An order as `ListOrder` shows it.
pub(crate) struct OrderRow {
    pub(crate) user: i64,
    pub(crate) status: Status,
    /// `None` of an order that was taken over without its time.
    pub(crate) created_at: Option<OffsetDateTime>,
    pub(crate) payment_deadline: Option<OffsetDateTime>,
    pub(crate) items: Vec<(Sku, u32)>,
    pub(crate) history: Vec<ChangeRow>,
}

/// One step of an order's history.
pub(crate) struct ChangeRow {
    pub(crate) sequence: i32,
    /// Empty for the first.
    pub(crate) from: String,
    pub(crate) status: String,
    pub(crate) actor: String,
    /// `None` of a step that was taken over without its time.
    pub(crate) at: Option<OffsetDateTime>,
}

/// One order with its items and history, read by one statement and so from one moment.
pub(crate) async fn read_order(db: &mut Db, order: OrderId) -> sqlx::Result<Option<OrderRow>> {
    let row = sqlx::query!(
        r#"SELECT o.user_id, o.status::text AS "status!", o.created_at, u.payment_deadline AS "payment_deadline?",
                  i.skus AS "skus!", i.counts AS "counts!",
                  h.sequences AS "sequences!", h.origins AS "origins!", h.statuses AS "statuses!", h.actors AS "actors!", h.ats AS "ats!: Vec<Option<OffsetDateTime>>"
           FROM loms.user_order o
           LEFT JOIN loms.unpaid_order u ON u.order_id = o.id
           CROSS JOIN LATERAL (
               SELECT coalesce(array_agg(sku ORDER BY sku), '{}') AS skus,
                      coalesce(array_agg(count ORDER BY sku), '{}') AS counts
               FROM loms.order_item WHERE order_id = o.id
           ) AS i
           CROSS JOIN LATERAL (
               SELECT coalesce(array_agg(sequence ORDER BY sequence), '{}') AS sequences,
                      coalesce(array_agg(coalesce(from_status::text, '') ORDER BY sequence), '{}') AS origins,
                      coalesce(array_agg(to_status::text ORDER BY sequence), '{}') AS statuses,
                      coalesce(array_agg(actor ORDER BY sequence), '{}') AS actors,
                      coalesce(array_agg(at ORDER BY sequence), '{}') AS ats
               FROM loms.status_change WHERE order_id = o.id
           ) AS h
           WHERE o.id = $1"#,
        order.0
    )
    .fetch_optional(db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let items = row.skus.into_iter().zip(row.counts).map(|(column, count)| {
        Ok((
            sku(column)?,
            u32::try_from(count).map_err(|error| sqlx::Error::Decode(error.into()))?,
        ))
    });
    let steps = row
        .sequences
        .into_iter()
        .zip(row.origins)
        .zip(row.statuses)
        .zip(row.actors)
        .zip(row.ats);
    Ok(Some(OrderRow {
        user: row.user_id,
        status: status(&row.status)?,
        created_at: row.created_at,
        payment_deadline: row.payment_deadline,
        items: items.collect::<sqlx::Result<_>>()?,
        history: steps
            .map(|((((sequence, from), status), actor), at)| ChangeRow {
                sequence,
                from,
                status,
                actor,
                at,
            })
            .collect(),
    }))
}

/// Locks one order until the end of the transaction: of pay, cancel and expire exactly one goes first.
pub(crate) async fn lock_order(db: &mut Db, order: OrderId) -> sqlx::Result<Option<Status>> {
    let locked = sqlx::query_scalar!(
        r#"SELECT status::text AS "status!" FROM loms.user_order WHERE id = $1 FOR NO KEY UPDATE"#,
        order.0
    )
    .fetch_optional(db)
    .await?;
    locked.map(|column| status(&column)).transpose()
}

/// Locks those of `orders` that nobody else has locked, and says their status.
pub(crate) async fn lock_free_orders(
    db: &mut Db,
    orders: &[OrderId],
) -> sqlx::Result<HashMap<OrderId, Status>> {
    let ids = ids(orders);
    let rows = sqlx::query!(
        r#"SELECT id, status::text AS "status!" FROM loms.user_order
           WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED"#,
        &ids
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| Ok((OrderId(row.id), status(&row.status)?)))
        .collect()
}

/// Locks orders whose deadline has passed, the oldest first, and says by how many seconds each is late. Orders that
/// somebody is paying or cancelling are skipped, so that replicas share the work and nobody waits.
pub(crate) async fn lock_due_orders(db: &mut Db, limit: i64) -> sqlx::Result<Vec<(OrderId, f64)>> {
    // no index is searched with clock_timestamp(), and now() is before the waits of this transaction; LATERAL, so that
    // each order is looked up, and locked, for its deadline: a plan of a join made while the tables are small reads all
    let rows = sqlx::query!(
        r#"SELECT o.id, extract(epoch FROM clock_timestamp() - u.payment_deadline)::float8 AS "late!"
           FROM (SELECT order_id, payment_deadline FROM loms.unpaid_order
                 WHERE payment_deadline <= statement_timestamp() ORDER BY payment_deadline OFFSET 0) AS u
           CROSS JOIN LATERAL (SELECT id FROM loms.user_order WHERE id = u.order_id AND status = 'awaiting payment'
                               FOR NO KEY UPDATE SKIP LOCKED) AS o
           LIMIT $1"#,
        limit
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (OrderId(row.id), row.late))
        .collect())
}

/// Bounds this transaction's waits for rows.
pub(crate) async fn wait_at_most(db: &mut Db, bound: Duration) -> sqlx::Result<()> {
    sqlx::query!(
        "SELECT set_config('lock_timeout', $1, TRUE)",
        bound.as_millis().to_string()
    )
    .fetch_one(db)
    .await?;
    Ok(())
}

/// Locks, of the stock that due orders hold units of, the rows that nobody else has locked: `(sku, warehouse_id)`.
pub(crate) async fn lock_free_stock_of_due_orders(db: &mut Db) -> sqlx::Result<Vec<(i64, i64)>> {
    let rows = sqlx::query!(
        r#"SELECT s.sku, s.warehouse_id FROM loms.stock s
           WHERE (s.sku, s.warehouse_id) IN
                 (SELECT r.sku, r.warehouse_id FROM loms.unpaid_order u
                  JOIN loms.reservation_stock r ON r.order_id = u.order_id
                  WHERE u.payment_deadline <= statement_timestamp())
           FOR NO KEY UPDATE SKIP LOCKED"#
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.sku, row.warehouse_id))
        .collect())
}

/// Like [`lock_due_orders`], of orders that hold units of nothing but `stock`.
pub(crate) async fn lock_due_orders_on(
    db: &mut Db,
    stock: &[(i64, i64)],
    limit: i64,
) -> sqlx::Result<Vec<(OrderId, f64)>> {
    let (skus, warehouses): (Vec<i64>, Vec<i64>) = stock.iter().copied().unzip();
    let rows = sqlx::query!(
        r#"SELECT o.id, extract(epoch FROM clock_timestamp() - u.payment_deadline)::float8 AS "late!"
           FROM (SELECT d.order_id, d.payment_deadline FROM loms.unpaid_order d
                 WHERE d.payment_deadline <= statement_timestamp()
                   AND NOT EXISTS (SELECT FROM loms.reservation_stock r
                                   WHERE r.order_id = d.order_id AND (r.sku, r.warehouse_id) NOT IN
                                         (SELECT sku, warehouse_id FROM UNNEST($2::bigint[], $3::bigint[]) AS s (sku, warehouse_id)))
                 ORDER BY d.payment_deadline OFFSET 0) AS u
           CROSS JOIN LATERAL (SELECT id FROM loms.user_order WHERE id = u.order_id AND status = 'awaiting payment'
                               FOR NO KEY UPDATE SKIP LOCKED) AS o
           LIMIT $1"#,
        limit,
        &skus,
        &warehouses
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (OrderId(row.id), row.late))
        .collect())
}

/// Seconds until the next deadline by the database's clock, below 0 when it has passed.
pub(crate) async fn seconds_to_next_deadline(db: &mut Db) -> sqlx::Result<Option<f64>> {
    sqlx::query_scalar!(
        r#"SELECT extract(epoch FROM min(payment_deadline) - clock_timestamp())::float8 FROM loms.unpaid_order"#
    )
    .fetch_one(db)
    .await
}

/// Ends the wait for payment of orders that the caller has locked. With `in_time_only`, not of those whose deadline has
/// passed: payment is late even if the sweeper has not come by. Returns whose wait it ended.
pub(crate) async fn end_payment_wait(
    db: &mut Db,
    orders: &[OrderId],
    in_time_only: bool,
) -> sqlx::Result<Vec<OrderId>> {
    let ids = ids(orders);
    let ended = sqlx::query_scalar!(
        r#"DELETE FROM loms.unpaid_order
           WHERE order_id = ANY($1) AND (NOT $2 OR payment_deadline > clock_timestamp())
           RETURNING order_id"#,
        &ids,
        in_time_only
    )
    .fetch_all(db)
    .await?;
    Ok(ended.into_iter().map(OrderId).collect())
}

/// Moves the reservations of orders into the write-offs.
pub(crate) async fn write_off(db: &mut Db, orders: &[OrderId]) -> sqlx::Result<()> {
    let ids = ids(orders);
    sqlx::query!(
        r#"WITH sold AS (
               DELETE FROM loms.reservation_stock WHERE order_id = ANY($1)
               RETURNING order_id, warehouse_id, sku, count
           )
           INSERT INTO loms.write_off (order_id, warehouse_id, sku, count)
           SELECT order_id, warehouse_id, sku, count FROM sold"#,
        &ids
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Units of a SKU in a warehouse.
pub(crate) struct UnitsRow {
    sku: i64,
    warehouse: i64,
    count: i64,
}

/// Takes the reservations of orders out, and returns what they held, added up, for [`put_on_sale`].
pub(crate) async fn end_reservations(
    db: &mut Db,
    orders: &[OrderId],
) -> sqlx::Result<Vec<UnitsRow>> {
    let ids = ids(orders);
    sqlx::query_as!(
        UnitsRow,
        r#"WITH ended AS (
               DELETE FROM loms.reservation_stock WHERE order_id = ANY($1) RETURNING sku, warehouse_id, count
           )
           SELECT sku, warehouse_id AS warehouse, sum(count)::bigint AS "count!" FROM ended GROUP BY sku, warehouse_id"#,
        &ids
    )
    .fetch_all(db)
    .await
}

/// Puts units back on sale; returns of how many SKUs and warehouses. New orders wait for these rows until the end of the
/// transaction.
pub(crate) async fn put_on_sale(db: &mut Db, units: &[UnitsRow]) -> sqlx::Result<u64> {
    let skus: Vec<i64> = units.iter().map(|row| row.sku).collect();
    let warehouses: Vec<i64> = units.iter().map(|row| row.warehouse).collect();
    let counts: Vec<i64> = units.iter().map(|row| row.count).collect();
    // locked by (sku, warehouse_id), as everybody does; an UPDATE alone takes its locks in whatever order its plan has
    let put = sqlx::query!(
        r#"UPDATE loms.stock s SET count = s.count + locked.units
           FROM (SELECT t.sku, t.warehouse_id, u.count AS units
                 FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[]) AS u (sku, warehouse_id, count)
                 JOIN loms.stock t ON t.sku = u.sku AND t.warehouse_id = u.warehouse_id
                 ORDER BY t.sku, t.warehouse_id FOR NO KEY UPDATE OF t) AS locked
           WHERE s.sku = locked.sku AND s.warehouse_id = locked.warehouse_id"#,
        &skus,
        &warehouses,
        &counts
    )
    .execute(db)
    .await?;
    Ok(put.rows_affected())
}

/// Sets the last status of orders that await payment, with its history row and event, whose trace context is in `traces`.
/// Returns how many there were: the condition is repeated here whatever the caller has checked.
pub(crate) async fn settle(
    db: &mut Db,
    orders: &[OrderId],
    traces: &[Option<&str>],
    to: Status,
    actor: Actor,
) -> sqlx::Result<u64> {
    let ids = ids(orders);
    // the clock, not now(): the transaction began before it had waited for its locks, or for a deadline to pass
    let settled = sqlx::query!(
        r#"WITH ended AS MATERIALIZED (
               SELECT e.id, e.traceparent FROM UNNEST($1::bigint[], $2::text[]) AS e (id, traceparent)
           ), settled AS (
               UPDATE loms.user_order o SET status = $3::text::loms.order_status FROM ended e
               WHERE o.id = e.id AND o.status = 'awaiting payment' RETURNING o.id, e.traceparent
           ), history AS (
               INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor, at)
               SELECT id, 3, 'awaiting payment'::loms.order_status, $3::text::loms.order_status, $4, clock_timestamp() FROM settled
           )
           INSERT INTO loms.outbox (order_id, sequence, traceparent) SELECT id, 3, traceparent FROM settled ORDER BY id"#,
        &ids,
        traces as &[Option<&str>],
        to.as_str(),
        actor.as_str()
    )
    .execute(db)
    .await?;
    Ok(settled.rows_affected())
}

fn ids(orders: &[OrderId]) -> Vec<i64> {
    orders.iter().map(|order| order.0).collect()
}

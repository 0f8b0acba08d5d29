//! What `loms import` reads from the tables of the system before, whose types it does not know, and
//! what it writes.

use std::{collections::BTreeMap, time::Duration};

use platform::{import::Source, pg::Db};
use sqlx::AssertSqlSafe;
use time::OffsetDateTime;

use super::placement::columns;
use crate::{
    delivery::Delivery,
    import::{ImportedOrder, ImportedStock, OldOrder, OldStock},
    order::{Actor, Status},
};

type OrderColumns = (
    i64,
    i64,
    String,
    Option<OffsetDateTime>,
    Option<OffsetDateTime>,
);

/// The next orders with ids above `after`, with their lines and reservations, of one moment.
pub(crate) async fn read_orders(
    source: &mut Source,
    after: Option<i64>,
) -> anyhow::Result<Vec<OldOrder>> {
    let orders = format!(
        "SELECT id::bigint, coalesce(user_id, 0)::bigint, coalesce(status::text, ''), {}, {} FROM public.user_order
         WHERE $1::bigint IS NULL OR id > $1 ORDER BY id LIMIT $2",
        source.time_of("user_order", "created_at"),
        source.time_of("user_order", "updated_at"),
    );
    let limit = source.slice();
    let mut tx = source.snapshot().await?;
    let rows: Vec<OrderColumns> = sqlx::query_as(AssertSqlSafe(orders))
        .bind(after)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
    let mut orders: BTreeMap<i64, OldOrder> = BTreeMap::new();
    for (id, user, status, created_at, updated_at) in rows {
        let order = OldOrder {
            id,
            user,
            status,
            created_at,
            updated_at,
            items: BTreeMap::new(),
            reserved: BTreeMap::new(),
        };
        orders.insert(id, order);
    }
    let (Some(&first), Some(&last)) = (orders.keys().next(), orders.keys().last()) else {
        return Ok(Vec::new());
    };
    let items: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT order_id::bigint, coalesce(sku, 0)::bigint, coalesce(count, 0)::bigint FROM public.order_item
         WHERE order_id BETWEEN $1 AND $2",
    )
    .bind(first)
    .bind(last)
    .fetch_all(&mut *tx)
    .await?;
    for (id, sku, units) in items {
        if let Some(order) = orders.get_mut(&id) {
            *order.items.entry(sku).or_default() += units;
        }
    }
    let reserved: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
        "SELECT order_id::bigint, coalesce(sku, 0)::bigint, coalesce(warehouse_id, 0)::bigint, coalesce(count, 0)::bigint
         FROM public.reservation_stock WHERE order_id BETWEEN $1 AND $2 AND count > 0",
    )
    .bind(first)
    .bind(last)
    .fetch_all(&mut *tx)
    .await?;
    for (id, sku, warehouse, units) in reserved {
        if let Some(order) = orders.get_mut(&id) {
            *order.reserved.entry((sku, warehouse)).or_default() += units;
        }
    }
    tx.rollback().await?;
    Ok(orders.into_values().collect())
}

/// Lines of orders that are not there.
pub(crate) async fn count_stray_lines(source: &mut Source) -> anyhow::Result<i64> {
    let mut tx = source.snapshot().await?;
    let stray = sqlx::query_scalar(
        "SELECT count(*) FROM public.order_item i
         WHERE NOT EXISTS (SELECT FROM public.user_order o WHERE o.id = i.order_id)",
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.rollback().await?;
    Ok(stray)
}

/// Every place that has stock, or of which something is reserved.
pub(crate) async fn read_stock(source: &mut Source) -> anyhow::Result<Vec<OldStock>> {
    let mut tx = source.snapshot().await?;
    let rows: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
        "SELECT coalesce(sku, 0)::bigint, coalesce(warehouse_id, 0)::bigint, sum(on_sale)::bigint, sum(reserved)::bigint
         FROM (SELECT sku, warehouse_id, count AS on_sale, 0 AS reserved FROM public.stock
               UNION ALL SELECT sku, warehouse_id, 0, count FROM public.reservation_stock WHERE count > 0) AS moved
         GROUP BY 1, 2 ORDER BY 1, 2",
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.rollback().await?;
    let rows = rows
        .into_iter()
        .map(|(sku, warehouse, count, reserved)| OldStock {
            sku,
            warehouse,
            count,
            reserved,
        });
    Ok(rows.collect())
}

/// A table that should be empty and is not.
pub(crate) async fn find_rows(db: &mut Db) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar!(
        r#"SELECT name AS "name!" FROM (
               SELECT 'user_order' AS name WHERE EXISTS (SELECT FROM loms.user_order)
               UNION ALL SELECT 'stock' WHERE EXISTS (SELECT FROM loms.stock)
               UNION ALL SELECT 'delivery' WHERE EXISTS (SELECT FROM loms.delivery)) AS there
           LIMIT 1"#
    )
    .fetch_optional(db)
    .await
}

/// No order gets a number that the system before has given.
pub(crate) async fn raise_order_numbers(db: &mut Db, highest: i64) -> sqlx::Result<()> {
    sqlx::query!(
        r#"SELECT setval('loms.user_order_id_seq', greatest($1, last_value)) FROM loms.user_order_id_seq
           WHERE $1::bigint > 0"#,
        highest
    )
    .fetch_optional(db)
    .await?;
    Ok(())
}

/// Writes orders with their lines, histories, reservations and what they have sold; and the events
/// of the steps that the import made.
pub(crate) async fn insert_orders(db: &mut Db, orders: &[ImportedOrder]) -> sqlx::Result<()> {
    let ids: Vec<i64> = orders.iter().map(|order| order.id).collect();
    let users: Vec<i64> = orders.iter().map(|order| order.user).collect();
    let statuses: Vec<&str> = orders.iter().map(|order| order.status.as_str()).collect();
    let created: Vec<_> = orders.iter().map(|order| order.created_at).collect();
    sqlx::query!(
        r#"INSERT INTO loms.user_order (id, user_id, status, created_at)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::text[]::loms.order_status[], $4::timestamptz[])"#,
        &ids,
        &users,
        &statuses as &[&str],
        &created as &[Option<OffsetDateTime>]
    )
    .execute(&mut *db)
    .await?;
    let items = columns(orders.iter().flat_map(|order| {
        let items = order.items.iter();
        items.map(|(&sku, &units)| [order.id, 0, sku, units])
    }));
    sqlx::query!(
        r#"INSERT INTO loms.order_item (order_id, sku, count)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[])"#,
        &items[0],
        &items[2],
        &items[3]
    )
    .execute(&mut *db)
    .await?;
    insert_histories(db, orders).await?;
    insert_units(db, orders).await?;
    let decided = orders.iter().filter(|order| order.decided);
    let decided: Vec<i64> = decided.map(|order| order.id).collect();
    sqlx::query!(
        r#"INSERT INTO loms.outbox (order_id, sequence)
           SELECT id, 2 FROM UNNEST($1::bigint[]) AS d (id) ORDER BY id"#,
        &decided
    )
    .execute(db)
    .await?;
    Ok(())
}

async fn insert_histories(db: &mut Db, orders: &[ImportedOrder]) -> sqlx::Result<()> {
    let (mut ids, mut sequences, mut times) = (Vec::new(), Vec::new(), Vec::new());
    let (mut from, mut to) = (Vec::new(), Vec::new());
    for order in orders {
        for (sequence, step) in (1..).zip(&order.history) {
            ids.push(order.id);
            sequences.push(sequence);
            from.push(step.from.map(Status::as_str));
            to.push(step.to.as_str());
            times.push(step.at);
        }
    }
    sqlx::query!(
        r#"INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor, at)
           SELECT s.order_id, s.sequence, s.from_status, s.to_status, $6, s.at
           FROM UNNEST($1::bigint[], $2::int[], $3::text[]::loms.order_status[], $4::text[]::loms.order_status[],
                       $5::timestamptz[]) AS s (order_id, sequence, from_status, to_status, at)"#,
        &ids,
        &sequences as &[i32],
        &from as &[Option<&str>],
        &to as &[&str],
        &times as &[Option<OffsetDateTime>],
        Actor::Import.as_str()
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Reservations, and what is sold at the time of the order's last step.
async fn insert_units(db: &mut Db, orders: &[ImportedOrder]) -> sqlx::Result<()> {
    let reserved = columns(orders.iter().flat_map(|order| {
        let reserved = order.reserved.iter();
        reserved.map(|(&(sku, warehouse), &units)| [order.id, warehouse, sku, units])
    }));
    sqlx::query!(
        r#"INSERT INTO loms.reservation_stock (order_id, warehouse_id, sku, count)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[])"#,
        &reserved[0],
        &reserved[1],
        &reserved[2],
        &reserved[3]
    )
    .execute(&mut *db)
    .await?;
    let sold = columns(orders.iter().flat_map(|order| {
        let sold = order.sold.iter();
        sold.map(|(&(sku, warehouse), &units)| [order.id, warehouse, sku, units])
    }));
    let times: Vec<_> = orders
        .iter()
        .flat_map(|order| {
            let last = order.history.last().and_then(|step| step.at);
            order.sold.iter().map(move |_| last)
        })
        .collect();
    sqlx::query!(
        r#"INSERT INTO loms.write_off (order_id, warehouse_id, sku, count, at)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::timestamptz[])"#,
        &sold[0],
        &sold[1],
        &sold[2],
        &sold[3],
        &times as &[Option<OffsetDateTime>]
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Puts on sale what is, and keeps what was below 0.
pub(crate) async fn insert_stock(db: &mut Db, stock: &[ImportedStock]) -> sqlx::Result<()> {
    let rows = columns(stock.iter().map(|row| {
        let (warehouse, sku) = (row.warehouse.get(), row.sku.db());
        [warehouse, sku, row.on_sale, row.deficit]
    }));
    sqlx::query!(
        r#"WITH rows AS MATERIALIZED (
               SELECT r.warehouse_id, r.sku, r.count, r.deficit
               FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) AS r (warehouse_id, sku, count, deficit)
           ), deficits AS (
               INSERT INTO loms.import_deficit (warehouse_id, sku, units)
               SELECT warehouse_id, sku, deficit FROM rows WHERE deficit > 0
           )
           INSERT INTO loms.stock (warehouse_id, sku, count) SELECT warehouse_id, sku, count FROM rows"#,
        &rows[0],
        &rows[1],
        &rows[2],
        &rows[3]
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Books what was received; its units are on sale, reserved or sold already.
pub(crate) async fn insert_delivery(db: &mut Db, delivery: &Delivery) -> sqlx::Result<()> {
    let lines = columns(
        delivery
            .lines()
            .map(|(sku, warehouse, units)| [warehouse.get(), sku.db(), units.cast_signed(), 0]),
    );
    sqlx::query!(
        "INSERT INTO loms.delivery (id, content_hash) VALUES ($1, $2)",
        delivery.id(),
        &delivery.content_hash()
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!(
        r#"INSERT INTO loms.delivery_line (delivery_id, warehouse_id, sku, count)
           SELECT $1, l.warehouse_id, l.sku, l.count
           FROM UNNEST($2::bigint[], $3::bigint[], $4::bigint[]) AS l (warehouse_id, sku, count)"#,
        delivery.id(),
        &lines[0],
        &lines[1],
        &lines[2]
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The system before has sent what it reached. Nothing else was in the tables.
pub(crate) async fn count_as_sent(db: &mut Db) -> sqlx::Result<()> {
    sqlx::query!(
        r#"UPDATE loms.relay SET sent = (SELECT count(*) FROM loms.status_change) - (SELECT count(*) FROM loms.outbox)"#
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Calls are planned for tables that are no longer empty.
pub(crate) async fn analyze(db: &mut Db) -> sqlx::Result<()> {
    sqlx::query!(
        "ANALYZE loms.user_order, loms.order_item, loms.status_change, loms.stock, loms.reservation_stock, loms.write_off, loms.delivery_line, loms.outbox"
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Orders that await payment have so long from now.
pub(crate) async fn insert_deadlines(db: &mut Db, payment_timeout: Duration) -> sqlx::Result<()> {
    sqlx::query!(
        r#"INSERT INTO loms.unpaid_order (order_id, payment_deadline)
           SELECT id, clock_timestamp() + make_interval(secs => $1) FROM loms.user_order WHERE status = 'awaiting payment'"#,
        payment_timeout.as_secs_f64()
    )
    .execute(db)
    .await?;
    Ok(())
}

//! The recount. Each statement returns a line for every difference, and nothing when all is well. They look only at
//! rows, never at what the service believes.

use platform::pg::Db;

/// One snapshot for all that follows; readers block nobody.
pub(crate) const BEGIN_SNAPSHOT: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// A recount reads whole tables: it has no time-out of its own.
pub(crate) async fn allow_long_statements(db: &mut Db) -> sqlx::Result<()> {
    sqlx::query!("SELECT set_config('statement_timeout', '0', TRUE)")
        .fetch_one(db)
        .await?;
    Ok(())
}

/// Per SKU and warehouse: on sale + reserved + written off = received.
pub(crate) async fn find_unconserved_stock(db: &mut Db) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('stock: sku %s warehouse %s: on sale %s + reserved %s + sold %s is not received %s',
                         sku, warehouse_id, sum(on_sale), sum(reserved), sum(sold), sum(received)) AS "line!"
           FROM (SELECT sku, warehouse_id, count AS on_sale, 0 AS reserved, 0 AS sold, 0 AS received FROM loms.stock
                 UNION ALL SELECT sku, warehouse_id, 0, count, 0, 0 FROM loms.reservation_stock
                 UNION ALL SELECT sku, warehouse_id, 0, 0, count, 0 FROM loms.write_off
                 UNION ALL SELECT sku, warehouse_id, 0, 0, 0, count FROM loms.delivery_line) AS moved
           GROUP BY sku, warehouse_id
           HAVING sum(on_sale) + sum(reserved) + sum(sold) <> sum(received) OR min(on_sale) < 0
           ORDER BY sku, warehouse_id"#
    )
    .fetch_all(db)
    .await
}

/// Orders that await payment hold exactly their items, payed ones have written exactly their items off, and no other
/// order holds or has sold anything.
pub(crate) async fn find_wrong_holdings(db: &mut Db) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('order %s (%s): sku %s: ordered %s, reserved %s, sold %s', order_id,
                         coalesce(o.status::text, 'unknown'), sku, sum(ordered), sum(reserved), sum(sold)) AS "line!"
           FROM (SELECT order_id, sku, count AS ordered, 0 AS reserved, 0 AS sold FROM loms.order_item
                 UNION ALL SELECT order_id, sku, 0, count, 0 FROM loms.reservation_stock
                 UNION ALL SELECT order_id, sku, 0, 0, count FROM loms.write_off) AS held
           LEFT JOIN loms.user_order o ON o.id = order_id
           GROUP BY order_id, sku, o.status
           HAVING sum(reserved) <> CASE WHEN o.status = 'awaiting payment' THEN sum(ordered) ELSE 0 END
               OR sum(sold) <> CASE WHEN o.status = 'payed' THEN sum(ordered) ELSE 0 END
               OR o.status IS NULL
           ORDER BY order_id, sku"#
    )
    .fetch_all(db)
    .await
}

/// Every order has items, if it was placed here, and a history without gaps whose steps follow each
/// other and end at its status.
pub(crate) async fn find_illegal_histories(db: &mut Db) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"WITH history AS (
               SELECT order_id, array_agg(sequence ORDER BY sequence) AS sequences,
                      array_agg(to_status ORDER BY sequence) AS reached,
                      array_agg(from_status ORDER BY sequence) AS left_behind
               FROM loms.status_change GROUP BY order_id
           )
           SELECT format('order %s: status %s, history %s %s, items %s', coalesce(o.id, h.order_id),
                         coalesce(o.status::text, 'unknown'), h.sequences, h.reached,
                         EXISTS (SELECT FROM loms.order_item i WHERE i.order_id = o.id)) AS "line!"
           FROM loms.user_order o FULL JOIN history h ON h.order_id = o.id
           WHERE o.id IS NULL OR h.order_id IS NULL
              OR h.sequences <> (SELECT array_agg(step) FROM generate_series(1, cardinality(h.reached)) AS step)
              OR h.reached[cardinality(h.reached)] <> o.status
              OR h.left_behind[2:] IS DISTINCT FROM h.reached[:cardinality(h.reached) - 1]
              OR (h.reached[2] IS DISTINCT FROM 'failed' AND h.reached[2] IS DISTINCT FROM 'awaiting payment')
              -- the system before kept orders whose lines it had lost
              OR (NOT EXISTS (SELECT FROM loms.order_item i WHERE i.order_id = o.id)
                  AND NOT EXISTS (SELECT FROM loms.status_change c
                                  WHERE c.order_id = o.id AND c.sequence = 1 AND c.actor = 'import'))
           ORDER BY coalesce(o.id, h.order_id)"#
    )
    .fetch_all(db)
    .await
}

/// An order has a payment deadline exactly while it awaits payment.
pub(crate) async fn find_wrong_deadlines(db: &mut Db) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('order %s (%s): payment deadline %s', coalesce(o.id, u.order_id),
                         coalesce(o.status::text, 'unknown'), coalesce(u.payment_deadline::text, 'missing')) AS "line!"
           FROM (SELECT id, status FROM loms.user_order WHERE status = 'awaiting payment') AS o
           FULL JOIN loms.unpaid_order u ON u.order_id = o.id
           WHERE o.id IS NULL OR u.order_id IS NULL
           ORDER BY coalesce(o.id, u.order_id)"#
    )
    .fetch_all(db)
    .await
}

/// Every step of a history has been sent or waits.
pub(crate) async fn find_lost_events(db: &mut Db) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('events: %s steps of histories, but %s sent + %s waiting', happened, sent, waiting) AS "line!"
           FROM (SELECT (SELECT count(*) FROM loms.status_change) AS happened,
                        (SELECT count(*) FROM loms.outbox) AS waiting,
                        (SELECT sum(sent) FROM loms.relay) AS sent) AS counted
           WHERE happened <> coalesce(sent, 0) + waiting"#
    )
    .fetch_all(db)
    .await
}

/// What was counted, for the report: orders, and units received.
pub(crate) async fn read_totals(db: &mut Db) -> sqlx::Result<(i64, i64)> {
    let row = sqlx::query!(
        r#"SELECT (SELECT count(*) FROM loms.user_order) AS "orders!",
                  coalesce((SELECT sum(count) FROM loms.delivery_line), 0)::bigint AS "units!""#
    )
    .fetch_one(db)
    .await?;
    Ok((row.orders, row.units))
}

/// SKUs of the stock, one for each of `places` between 0 and 1, the same one once.
pub(crate) async fn pick_skus(db: &mut Db, places: &[f64]) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar!(
        r#"SELECT DISTINCT found.sku AS "sku!"
           FROM (SELECT min(sku) AS low, max(sku) AS high FROM loms.stock) AS range
           CROSS JOIN UNNEST($1::float8[]) AS place
           CROSS JOIN LATERAL (SELECT sku FROM loms.stock
                               WHERE sku >= range.low + floor(place * (range.high - range.low + 1))::bigint
                               ORDER BY sku LIMIT 1) AS found"#,
        places
    )
    .fetch_all(db)
    .await
}

/// Orders, picked like SKUs.
pub(crate) async fn pick_orders(db: &mut Db, places: &[f64]) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar!(
        r#"SELECT DISTINCT found.id AS "id!"
           FROM (SELECT min(id) AS low, max(id) AS high FROM loms.user_order) AS range
           CROSS JOIN UNNEST($1::float8[]) AS place
           CROSS JOIN LATERAL (SELECT id FROM loms.user_order
                               WHERE id >= range.low + floor(place * (range.high - range.low + 1))::bigint
                               ORDER BY id LIMIT 1) AS found"#,
        places
    )
    .fetch_all(db)
    .await
}

/// [`find_unconserved_stock`] for a few SKUs. A statement of its own: a parameter that may be absent would cost it the
/// indexes.
pub(crate) async fn find_unconserved_stock_of(
    db: &mut Db,
    skus: &[i64],
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('stock: sku %s warehouse %s: on sale %s + reserved %s + sold %s is not received %s',
                         sku, warehouse_id, sum(on_sale), sum(reserved), sum(sold), sum(received)) AS "line!"
           FROM (SELECT sku, warehouse_id, count AS on_sale, 0 AS reserved, 0 AS sold, 0 AS received FROM loms.stock
                 UNION ALL SELECT sku, warehouse_id, 0, count, 0, 0 FROM loms.reservation_stock
                 UNION ALL SELECT sku, warehouse_id, 0, 0, count, 0 FROM loms.write_off
                 UNION ALL SELECT sku, warehouse_id, 0, 0, 0, count FROM loms.delivery_line) AS moved
           WHERE sku = ANY($1)
           GROUP BY sku, warehouse_id
           HAVING sum(on_sale) + sum(reserved) + sum(sold) <> sum(received) OR min(on_sale) < 0
           ORDER BY sku, warehouse_id"#,
        skus
    )
    .fetch_all(db)
    .await
}

/// [`find_wrong_holdings`] for a few orders.
pub(crate) async fn find_wrong_holdings_of(
    db: &mut Db,
    orders: &[i64],
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('order %s (%s): sku %s: ordered %s, reserved %s, sold %s', order_id, o.status, sku,
                         sum(ordered), sum(reserved), sum(sold)) AS "line!"
           FROM (SELECT order_id, sku, count AS ordered, 0 AS reserved, 0 AS sold FROM loms.order_item
                 UNION ALL SELECT order_id, sku, 0, count, 0 FROM loms.reservation_stock
                 UNION ALL SELECT order_id, sku, 0, 0, count FROM loms.write_off) AS held
           JOIN loms.user_order o ON o.id = order_id
           WHERE order_id = ANY($1)
           GROUP BY order_id, sku, o.status
           HAVING sum(reserved) <> CASE WHEN o.status = 'awaiting payment' THEN sum(ordered) ELSE 0 END
               OR sum(sold) <> CASE WHEN o.status = 'payed' THEN sum(ordered) ELSE 0 END
           ORDER BY order_id, sku"#,
        orders
    )
    .fetch_all(db)
    .await
}

/// Orders of a few whose history does not end at their status, or whose deadline does not fit it.
pub(crate) async fn find_wrong_statuses_of(
    db: &mut Db,
    orders: &[i64],
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT format('order %s: status %s, history ends at %s, unpaid %s', o.id, o.status,
                         coalesce(last.to_status::text, 'nothing'), u.order_id IS NOT NULL) AS "line!"
           FROM loms.user_order o
           LEFT JOIN LATERAL (SELECT to_status FROM loms.status_change h WHERE h.order_id = o.id
                              ORDER BY sequence DESC LIMIT 1) AS last ON TRUE
           LEFT JOIN loms.unpaid_order u ON u.order_id = o.id
           WHERE o.id = ANY($1)
             AND (last.to_status IS DISTINCT FROM o.status
                  OR (o.status = 'awaiting payment') <> (u.order_id IS NOT NULL))
           ORDER BY o.id"#,
        orders
    )
    .fetch_all(db)
    .await
}

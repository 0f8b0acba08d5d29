//! What an import must have made of the tables of the system before, by statements of the tests'
//! own.

use std::collections::BTreeSet;

use sqlx::PgPool;

use crate::oracle::{count, rows};

/// All that an import has written, but for what the clock says.
pub(crate) async fn written(pool: &PgPool) -> BTreeSet<String> {
    let lines: Vec<(String,)> = rows(
        pool,
        "SELECT 'order ' || o::text FROM loms.user_order o
         UNION ALL SELECT 'item ' || i::text FROM loms.order_item i
         UNION ALL SELECT 'step ' || s::text FROM loms.status_change s
         UNION ALL SELECT 'stock ' || s::text FROM loms.stock s
         UNION ALL SELECT 'reserved ' || r::text FROM loms.reservation_stock r
         UNION ALL SELECT 'sold ' || w::text FROM loms.write_off w
         UNION ALL SELECT 'line ' || l.warehouse_id || ' ' || l.sku || ' ' || l.count FROM loms.delivery_line l
         UNION ALL SELECT 'deficit ' || d::text FROM loms.import_deficit d
         UNION ALL SELECT 'unpaid ' || order_id FROM loms.unpaid_order
         UNION ALL SELECT 'waits ' || row_number() OVER (ORDER BY id) || ' ' || order_id || ' ' || sequence FROM loms.outbox
         UNION ALL SELECT 'sent ' || sent FROM loms.relay
         UNION ALL SELECT 'number ' || last_value FROM loms.user_order_id_seq
         UNION ALL SELECT 'import ' || state || ' ' || through FROM loms.import
         ORDER BY 1",
    )
    .await;
    lines.into_iter().map(|(line,)| line).collect()
}

/// Says only what differs.
#[track_caller]
pub(crate) fn assert_same(one: &BTreeSet<String>, other: &BTreeSet<String>) {
    let differ: Vec<_> = one.symmetric_difference(other).collect();
    assert!(differ.is_empty(), "{differ:#?}");
    assert!(one.len() > 1000, "{one:?}");
}

/// Held against the tables that are still in `public` of the same database, by statements of the
/// test's own.
pub(crate) async fn assert_taken_over(pool: &PgPool) {
    for (what, differences) in [
        (
            "orders keep number and user",
            "SELECT count(*) FROM public.user_order p FULL JOIN loms.user_order o ON o.id = p.id
             WHERE o.user_id IS DISTINCT FROM p.user_id",
        ),
        (
            "statuses are kept, but of orders that are new or not wholly reserved",
            "SELECT count(*) FROM public.user_order p JOIN loms.user_order o ON o.id = p.id
             CROSS JOIN LATERAL (SELECT count(*) > 0 AND bool_and(i.count <= coalesce(held, 0)) AS whole
                 FROM public.order_item i LEFT JOIN LATERAL (
                     SELECT sum(r.count) AS held FROM public.reservation_stock r WHERE r.order_id = i.order_id AND r.sku = i.sku) AS h ON TRUE
                 WHERE i.order_id = p.id) AS w
             WHERE o.status::text <> CASE WHEN p.status = 'new' OR p.status = 'awaiting payment' AND NOT w.whole
                                          THEN 'failed' ELSE p.status::text END",
        ),
        (
            "lines are kept",
            "SELECT count(*) FROM public.order_item p FULL JOIN loms.order_item i ON (i.order_id, i.sku) = (p.order_id, p.sku)
             WHERE i.count IS DISTINCT FROM p.count",
        ),
        (
            "units by SKU and warehouse are kept: what is on sale, reserved, sold from there, and missing",
            "SELECT count(*) FROM (
                 SELECT sku, warehouse_id, sum(before) AS before, sum(after) AS after FROM (
                     SELECT sku, warehouse_id, count AS before, 0 AS after FROM public.stock
                     UNION ALL SELECT sku, warehouse_id, count, 0 FROM public.reservation_stock
                     UNION ALL SELECT sku, warehouse_id, 0, count FROM loms.stock
                     UNION ALL SELECT sku, warehouse_id, 0, count FROM loms.reservation_stock
                     UNION ALL SELECT sku, warehouse_id, 0, count FROM loms.write_off
                     UNION ALL SELECT sku, warehouse_id, 0, -units FROM loms.import_deficit) AS moved
                 WHERE warehouse_id <> 9223372036854775807 GROUP BY sku, warehouse_id) AS places
             WHERE before <> after",
        ),
        (
            "a place below 0 has nothing on sale",
            "SELECT count(*) FROM loms.import_deficit d JOIN loms.stock s USING (sku, warehouse_id) WHERE s.count <> 0",
        ),
        (
            "steps are the import's, and have no time",
            "SELECT count(*) FROM loms.status_change WHERE actor <> 'import' OR at IS NOT NULL",
        ),
        (
            "orders and sales have no time",
            "SELECT (SELECT count(*) FROM loms.user_order WHERE created_at IS NOT NULL)
                  + (SELECT count(*) FROM loms.write_off WHERE at IS NOT NULL)",
        ),
        (
            "the last step of orders that failed by the import is told, and nothing else",
            "SELECT count(*) FROM loms.outbox e
             FULL JOIN (SELECT o.id FROM loms.user_order o JOIN public.user_order p USING (id)
                        WHERE o.status::text <> p.status::text) AS decided ON decided.id = e.order_id
             WHERE e.sequence IS DISTINCT FROM 2 OR decided.id IS NULL",
        ),
        (
            "deadlines are the time-out from now",
            "SELECT count(*) FROM loms.unpaid_order
             WHERE payment_deadline NOT BETWEEN now() + interval '5 minutes' AND now() + interval '10 minutes'",
        ),
        (
            "nothing is on sale in the warehouse of what was sold before",
            "SELECT count(*) FROM loms.stock WHERE warehouse_id = 9223372036854775807",
        ),
    ] {
        assert_eq!(count(pool, differences).await, 0, "{what}");
    }
    // and the load had all of it
    for (what, some) in [
        (
            "new",
            "SELECT count(*) FROM public.user_order WHERE status = 'new'",
        ),
        ("told", "SELECT count(*) FROM loms.outbox"),
        ("unpaid", "SELECT count(*) FROM loms.unpaid_order"),
        (
            "without lines",
            "SELECT count(*) FROM public.user_order WHERE id NOT IN (SELECT order_id FROM public.order_item)",
        ),
        (
            "leaked",
            "SELECT count(*) FROM public.reservation_stock JOIN public.user_order ON id = order_id
             WHERE status IN ('failed', 'cancelled')",
        ),
        (
            "sold from a known place",
            "SELECT count(*) FROM loms.write_off WHERE warehouse_id < 10",
        ),
        ("below 0", "SELECT count(*) FROM loms.import_deficit"),
    ] {
        assert!(count(pool, some).await > 0, "{what}");
    }
}

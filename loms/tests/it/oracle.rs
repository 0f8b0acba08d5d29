//! The recount: what must hold in the tables and the log, whatever the service believes. Written apart from
//! `loms audit`, so that a mistake in one is not in the other.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{FromRow, PgPool, Row as _, postgres::PgRow};

use crate::{kafka, test_app::eventually};

type Units = BTreeMap<(i64, i64), i64>;

/// What the statement returns, of any shape.
pub(crate) async fn rows<T>(pool: &PgPool, statement: &'static str) -> Vec<T>
where
    T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
{
    sqlx::query_as(statement)
        .fetch_all(pool)
        .await
        .expect("rows")
}

/// One number.
pub(crate) async fn count(pool: &PgPool, statement: &'static str) -> i64 {
    let row = sqlx::query(statement).fetch_one(pool).await.expect("a row");
    row.get(0)
}

pub(crate) async fn run(pool: &PgPool, statement: &'static str) -> u64 {
    let done = sqlx::raw_sql(statement).execute(pool).await;
    done.expect("a statement that works").rows_affected()
}

/// Asserts that stock is conserved, that orders hold and have sold what they should, and that histories are legal and
/// equal to the events in the log of `topic`.
pub(crate) async fn recount(pool: &PgPool, topic: &str) {
    conserved(pool).await;
    held_and_sold(pool).await;
    let histories = histories(pool).await;
    let log = published(topic).await;
    let orders: BTreeSet<_> = log.keys().chain(histories.keys()).collect();
    let differ = |order: &&i64| log.get(*order) != histories.get(*order);
    let differ: Vec<_> = orders
        .into_iter()
        .filter(differ)
        .map(|order| (order, log.get(order), histories.get(order)))
        .collect();
    assert!(differ.is_empty(), "order, log, history: {differ:?}");
}

async fn sums(pool: &PgPool, statement: &'static str) -> Units {
    let found: Vec<(i64, i64, i64)> = rows(pool, statement).await;
    let mut sums = Units::new();
    for (one, other, units) in found {
        *sums.entry((one, other)).or_default() += units;
    }
    sums
}

fn add(into: &mut Units, more: Units) {
    for (key, units) in more {
        *into.entry(key).or_default() += units;
    }
}

async fn conserved(pool: &PgPool) {
    let on_sale = sums(pool, "SELECT warehouse_id, sku, count FROM loms.stock").await;
    assert!(on_sale.values().all(|units| *units >= 0), "{on_sale:?}");
    let mut moved = on_sale;
    let reserved = "SELECT warehouse_id, sku, count FROM loms.reservation_stock";
    add(&mut moved, sums(pool, reserved).await);
    add(
        &mut moved,
        sums(pool, "SELECT warehouse_id, sku, count FROM loms.write_off").await,
    );
    let received = sums(
        pool,
        "SELECT warehouse_id, sku, count FROM loms.delivery_line",
    )
    .await;
    assert_eq!(moved, received, "units by (warehouse, SKU)");
}

async fn held_and_sold(pool: &PgPool) {
    let ordered = |status: &'static str| async move {
        let statement = "SELECT i.order_id, i.sku, i.count FROM loms.order_item i
                         JOIN loms.user_order o ON o.id = i.order_id WHERE o.status::text = $1";
        let found: Vec<(i64, i64, i64)> = sqlx::query_as(statement)
            .bind(status)
            .fetch_all(pool)
            .await
            .expect("rows");
        found
            .into_iter()
            .map(|(order, sku, units)| ((order, sku), units))
            .collect::<Units>()
    };
    let held = sums(
        pool,
        "SELECT order_id, sku, count FROM loms.reservation_stock",
    )
    .await;
    assert_eq!(held, ordered("awaiting payment").await, "reserved units");
    let sold = sums(pool, "SELECT order_id, sku, count FROM loms.write_off").await;
    assert_eq!(sold, ordered("payed").await, "sold units");
    let waiting: Vec<(i64,)> = rows(
        pool,
        "SELECT order_id FROM loms.unpaid_order ORDER BY order_id",
    )
    .await;
    let unpaid = "SELECT id FROM loms.user_order WHERE status = 'awaiting payment' ORDER BY id";
    assert_eq!(waiting, rows::<(i64,)>(pool, unpaid).await, "deadlines");
}

/// The server's own count. A session reports it when it ends: those of the service must have ended.
pub(crate) async fn no_deadlocks(pool: &PgPool) {
    eventually("the end of the service's sessions", async || {
        let sessions = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND application_name LIKE 'loms%'";
        count(pool, sessions).await == 0
    })
    .await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(count(pool, deadlocks).await, 0, "deadlocks");
}

type Histories = BTreeMap<i64, Vec<(i64, String)>>;

async fn histories(pool: &PgPool) -> Histories {
    let steps: Vec<(i64, i32, String)> = rows(
        pool,
        "SELECT order_id, sequence, to_status::text FROM loms.status_change ORDER BY order_id, sequence",
    )
    .await;
    let mut histories = Histories::new();
    for (order, sequence, status) in steps {
        let history = histories.entry(order).or_default();
        history.push((i64::from(sequence), status));
    }
    let legal = [
        &["new", "failed"][..],
        &["new", "awaiting payment"],
        &["new", "awaiting payment", "payed"],
        &["new", "awaiting payment", "cancelled"],
    ];
    for (order, history) in &histories {
        let statuses: Vec<_> = history.iter().map(|(_, status)| status.as_str()).collect();
        assert!(legal.contains(&statuses.as_slice()), "{order}: {history:?}");
        let sequences = history.iter().map(|(sequence, _)| *sequence);
        assert!(sequences.eq(1..=history.len() as i64), "{history:?}");
    }
    let last: BTreeMap<i64, String> = histories
        .iter()
        .filter_map(|(order, history)| Some((*order, history.last()?.1.clone())))
        .collect();
    let orders: Vec<(i64, String)> =
        rows(pool, "SELECT id, status::text FROM loms.user_order").await;
    assert_eq!(last, orders.into_iter().collect(), "statuses");
    histories
}

/// The first occurrence of each event, by order, in the order of the log: repeats may follow, gaps may not.
async fn published(topic: &str) -> Histories {
    let mut seen = Histories::new();
    for event in kafka::read_log(topic).await {
        let order = event.value["OrderID"].as_i64().expect("an order");
        assert_eq!(event.key, order.to_string());
        let step = (
            event.value["Sequence"].as_i64().expect("a sequence"),
            event.value["Status"].as_str().expect("a status").to_owned(),
        );
        let history = seen.entry(order).or_default();
        if !history.contains(&step) {
            history.push(step);
        }
    }
    seen
}

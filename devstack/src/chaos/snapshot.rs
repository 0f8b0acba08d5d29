//! The raw tables of the three services and the log, read by statements of our own: what the recount judges.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use sqlx::{FromRow, PgConnection, postgres::PgRow};

use super::{
    facts::{Lines, Status},
    log::{Log, Topics},
};
use crate::{postgres::connect, stack::Stack};

/// Everything there is.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshot {
    pub stock: Stock,
    pub orders: BTreeMap<i64, Order>,
    /// By order, in the order of sequence.
    pub changes: BTreeMap<i64, Vec<Change>>,
    /// By (user, key).
    pub keys: BTreeMap<(i64, String), i64>,
    pub outbox: i64,
    pub purchases: Vec<Purchase>,
    /// Units in carts, by (user, SKU).
    pub carts: BTreeMap<(i64, i64), i64>,
    pub messages: Vec<Message>,
    pub log: Log,
}

/// Units by (order, warehouse, SKU).
pub(super) type Units = BTreeMap<(i64, i64, i64), i64>;

/// Where the units are, and how many there were.
#[derive(Debug, Clone, Default)]
pub(super) struct Stock {
    /// By (warehouse, SKU).
    pub on_sale: BTreeMap<(i64, i64), i64>,
    pub reserved: Units,
    pub written_off: Units,
    /// By delivery, then by (warehouse, SKU).
    pub delivered: BTreeMap<String, BTreeMap<(i64, i64), i64>>,
}

/// A row of `user_order` with its lines.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub user: i64,
    pub status: Status,
    pub lines: Lines,
    /// Whether it has a payment deadline.
    pub unpaid: bool,
}

/// A row of `status_change`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub sequence: i64,
    pub from: Option<Status>,
    pub to: Status,
}

/// A row of `purchase` with its lines.
#[derive(Debug, Clone)]
pub(super) struct Purchase {
    pub id: String,
    pub user: i64,
    pub key: Option<String>,
    /// `None` while it is open.
    pub outcome: Option<String>,
    pub order: Option<i64>,
    pub lines: Lines,
}

/// A row of `message`.
#[derive(Debug, Clone)]
pub(super) struct Message {
    pub user: i64,
    pub order: i64,
    pub sequence: i64,
    pub status: String,
}

impl Snapshot {
    /// Reads a stack that has come to rest.
    pub(super) async fn read(stack: &Stack) -> Result<Snapshot> {
        let mut snapshot = Snapshot {
            log: Topics::of(stack).read().await?,
            ..Snapshot::default()
        };
        snapshot.read_loms(stack.database("loms")?).await?;
        snapshot.read_checkout(stack.database("checkout")?).await?;
        let mut db = connect(stack.database("notifications")?).await?;
        let statement = "SELECT user_id, order_id, sequence::bigint, status FROM notifications.message ORDER BY id";
        let messages: Vec<(i64, i64, i64, String)> = rows(&mut db, statement).await?;
        let message = |(user, order, sequence, status)| Message {
            user,
            order,
            sequence,
            status,
        };
        snapshot.messages = messages.into_iter().map(message).collect();
        Ok(snapshot)
    }

    async fn read_loms(&mut self, url: &str) -> Result<()> {
        let mut db = connect(url).await?;
        self.stock = Stock::read(&mut db).await?;
        let orders: Vec<(i64, i64, String, bool)> = rows(
            &mut db,
            "SELECT o.id, o.user_id, o.status::text, u.order_id IS NOT NULL
             FROM loms.user_order o LEFT JOIN loms.unpaid_order u ON u.order_id = o.id",
        )
        .await?;
        for (id, user, status, unpaid) in orders {
            let (status, lines) = (parse(&status)?, Lines::new());
            let order = Order {
                user,
                status,
                lines,
                unpaid,
            };
            self.orders.insert(id, order);
        }
        let items: Vec<(i64, i64, i64)> =
            rows(&mut db, "SELECT order_id, sku, count FROM loms.order_item").await?;
        for (order, sku, count) in items {
            if let Some(order) = self.orders.get_mut(&order) {
                order.lines.insert(sku, count);
            }
        }
        let changes: Vec<(i64, i64, Option<String>, String)> = rows(
            &mut db,
            "SELECT order_id, sequence::bigint, from_status::text, to_status::text
             FROM loms.status_change ORDER BY order_id, sequence",
        )
        .await?;
        for (order, sequence, from, to) in changes {
            let (from, to) = (from.as_deref().map(parse).transpose()?, parse(&to)?);
            let change = Change { sequence, from, to };
            self.changes.entry(order).or_default().push(change);
        }
        let keys: Vec<(i64, String, i64)> = rows(
            &mut db,
            "SELECT user_id, key, order_id FROM loms.idempotency_key",
        )
        .await?;
        self.keys = keys
            .into_iter()
            .map(|(user, key, order)| ((user, key), order))
            .collect();
        let waiting: Vec<(i64,)> = rows(&mut db, "SELECT count(*) FROM loms.outbox").await?;
        self.outbox = waiting.iter().map(|(count,)| count).sum();
        Ok(())
    }

    async fn read_checkout(&mut self, url: &str) -> Result<()> {
        let mut db = connect(url).await?;
        let carts: Vec<(i64, i64, i64)> = rows(
            &mut db,
            "SELECT c.user_id, i.sku, i.count
             FROM checkout.cart c JOIN checkout.cart_item i ON i.cart_id = c.id",
        )
        .await?;
        self.carts = carts
            .into_iter()
            .map(|(user, sku, count)| ((user, sku), count))
            .collect();
        let mut lines: BTreeMap<String, Lines> = BTreeMap::new();
        let items: Vec<(String, i64, i64)> = rows(
            &mut db,
            "SELECT purchase_id::text, sku, count FROM checkout.purchase_item",
        )
        .await?;
        for (purchase, sku, count) in items {
            lines.entry(purchase).or_default().insert(sku, count);
        }
        type Row = (String, i64, Option<String>, Option<String>, Option<i64>);
        let purchases: Vec<Row> = rows(
            &mut db,
            "SELECT p.id::text, c.user_id, p.idempotency_key, p.outcome, p.order_id
             FROM checkout.purchase p JOIN checkout.cart c ON c.id = p.cart_id ORDER BY p.created_at",
        )
        .await?;
        let purchase = |(id, user, key, outcome, order): Row| Purchase {
            lines: lines.remove(&id).unwrap_or_default(),
            id,
            user,
            key,
            outcome,
            order,
        };
        self.purchases = purchases.into_iter().map(purchase).collect();
        Ok(())
    }
}

impl Stock {
    async fn read(db: &mut PgConnection) -> Result<Stock> {
        let on_sale: Vec<(i64, i64, i64)> =
            rows(db, "SELECT warehouse_id, sku, count FROM loms.stock").await?;
        let on_sale = on_sale.into_iter();
        let mut stock = Stock {
            on_sale: on_sale
                .map(|(warehouse, sku, count)| ((warehouse, sku), count))
                .collect(),
            ..Stock::default()
        };
        type Row = (i64, i64, i64, i64);
        let units = |found: Vec<Row>| -> Units {
            let units = found.into_iter();
            units
                .map(|(order, warehouse, sku, count)| ((order, warehouse, sku), count))
                .collect()
        };
        let reserved = "SELECT order_id, warehouse_id, sku, count FROM loms.reservation_stock";
        stock.reserved = units(rows(db, reserved).await?);
        let written_off = "SELECT order_id, warehouse_id, sku, count FROM loms.write_off";
        stock.written_off = units(rows(db, written_off).await?);
        let delivered: Vec<(String, i64, i64, i64)> = rows(
            db,
            "SELECT delivery_id, warehouse_id, sku, count FROM loms.delivery_line",
        )
        .await?;
        for (id, warehouse, sku, count) in delivered {
            let delivery = stock.delivered.entry(id).or_default();
            delivery.insert((warehouse, sku), count);
        }
        Ok(stock)
    }
}

/// What a statement returns, of any shape.
pub(super) async fn rows<T>(db: &mut PgConnection, statement: &'static str) -> Result<Vec<T>>
where
    T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
{
    let found = sqlx::query_as(statement).fetch_all(db).await;
    found.with_context(|| format!("run {statement}"))
}

fn parse(status: &str) -> Result<Status> {
    Status::parse(status).with_context(|| format!("a status of {status:?}"))
}

//! `loms import`: orders and stock of the system before, so that a payment for its order 1 pays
//! that order.

mod decide;
mod plan;

use std::time::Duration;

use anyhow::Context as _;
use platform::{
    import::{self, Import, ImportArgs, Moment, Original, Source, Table},
    pg::Db,
};

pub(crate) use self::{
    decide::{ImportedOrder, OldOrder},
    plan::{ImportedStock, OldStock, Plan},
};
use crate::{
    app::{MIGRATOR, SERVICE},
    config::Config,
    crash::CrashPoint,
    store::{import as store, online::ONLINE},
};

/// The tables of the system before.
pub(crate) static ORIGINAL: Original = Original {
    service: SERVICE,
    tables: &[
        Table {
            name: "user_order",
            columns: &["id", "user_id", "status"],
            optional: &["created_at", "updated_at"],
            key: "id",
        },
        Table {
            name: "order_item",
            columns: &["order_id", "sku", "count"],
            optional: &[],
            key: "order_id",
        },
        Table {
            name: "stock",
            columns: &["warehouse_id", "sku", "count"],
            optional: &[],
            key: "warehouse_id",
        },
        Table {
            name: "reservation_stock",
            columns: &["order_id", "warehouse_id", "sku", "count"],
            optional: &[],
            key: "order_id",
        },
    ],
};

/// Takes the orders and the stock of the system before over, or says what would become of them.
/// Returns what to print.
///
/// # Errors
/// Everything that an operator must settle first, on one line; a database that is away.
pub async fn import(config: &Config, args: &ImportArgs) -> anyhow::Result<String> {
    let orders = Orders {
        plan: Plan::default(),
        delivery: String::new(),
        payment_timeout: config.orders.payment_timeout,
    };
    let schema = (&MIGRATOR, &ONLINE[..]);
    import::run(args, &config.postgres, &ORIGINAL, schema, orders).await
}

struct Orders {
    plan: Plan,
    /// The id of the delivery that brings all there is.
    delivery: String,
    payment_timeout: Duration,
}

impl Import for Orders {
    type Batch = Vec<OldOrder>;

    async fn read(
        &self,
        source: &mut Source,
        after: Option<i64>,
    ) -> anyhow::Result<Option<Vec<OldOrder>>> {
        let batch = store::read_orders(source, after).await;
        let batch = batch.context("reading orders")?;
        Ok((!batch.is_empty()).then_some(batch))
    }

    fn last(&self, batch: &Vec<OldOrder>) -> i64 {
        batch.last().map_or(i64::MAX, |order| order.id)
    }

    fn note(&mut self, batch: &Vec<OldOrder>) {
        for order in batch {
            self.plan.note_order(order);
        }
    }

    async fn read_rest(&mut self, source: &mut Source) -> anyhow::Result<()> {
        let printable = |char: char| match (' '..='~').contains(&char) {
            true => char,
            false => '?',
        };
        self.delivery = format!("import:{}", source.name())
            .chars()
            .map(printable)
            .collect();
        self.plan.highest = source.highest("user_order", "id").await?;
        self.plan.stray_lines = store::count_stray_lines(source).await?;
        let stock = store::read_stock(source).await.context("reading stock")?;
        self.plan.note_stock(stock);
        Ok(())
    }

    fn refused(&self) -> Vec<String> {
        self.plan.refused()
    }

    fn report(&self) -> String {
        self.plan.report(&self.delivery)
    }

    async fn begin(&self, db: &mut Db) -> anyhow::Result<Option<String>> {
        if let Some(table) = store::find_rows(db).await? {
            return Ok(Some(format!("loms.{table} has rows")));
        }
        store::raise_order_numbers(db, self.plan.highest).await?;
        Ok(None)
    }

    async fn write(&self, db: &mut Db, batch: &Vec<OldOrder>) -> anyhow::Result<()> {
        let decided = batch.iter().map(OldOrder::decide);
        let orders = decided.collect::<Result<Vec<_>, _>>();
        // none is, or nothing would have been written
        let orders = orders.map_err(|why| anyhow::anyhow!(why))?;
        Ok(store::insert_orders(db, &orders).await?)
    }

    async fn finish(&self, db: &mut Db) -> anyhow::Result<()> {
        store::insert_stock(db, &self.plan.stock).await?;
        let delivery = self.plan.delivery(&self.delivery);
        if delivery.lines().len() > 0 {
            store::insert_delivery(db, &delivery).await?;
        }
        store::count_as_sent(db).await?;
        store::analyze(db).await?;
        // last: the time-out begins when the orders can be payed
        Ok(store::insert_deadlines(db, self.payment_timeout).await?)
    }

    fn pass(&self, moment: Moment) {
        match moment {
            Moment::Writing => CrashPoint::SliceImporting.pass(),
            Moment::Written => CrashPoint::SliceImported.pass(),
        }
    }
}

//! `loms audit`: recounts everything from the tables, in one snapshot, on a live system, blocking nobody.

use std::fmt;

use anyhow::Context as _;
use platform::pg::{self, Db};

use crate::{config::Config, store::audit as store};

/// What a recount found.
#[derive(Debug)]
pub struct Report {
    /// A line each; empty when everything adds up.
    pub differences: Vec<String>,
    pub orders: i64,
    pub units_received: i64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.differences {
            writeln!(f, "{line}")?;
        }
        write!(
            f,
            "audit: {} orders, {} units received, {} differences",
            self.orders,
            self.units_received,
            self.differences.len()
        )
    }
}

/// Recounts conservation of stock, holdings of orders against their items, histories, deadlines and events.
///
/// # Errors
/// The database is away.
pub async fn audit(config: &Config) -> anyhow::Result<Report> {
    let mut db = pg::connect_as(&config.postgres, "loms-audit").await?;
    recount(&mut db).await
}

async fn recount(db: &mut Db) -> anyhow::Result<Report> {
    let mut tx = db
        .begin_with(store::BEGIN_SNAPSHOT)
        .await
        .context("beginning the snapshot")?;
    store::allow_long_statements(&mut tx).await?;
    let mut differences = store::find_unconserved_stock(&mut tx).await?;
    differences.extend(store::find_wrong_holdings(&mut tx).await?);
    differences.extend(store::find_illegal_histories(&mut tx).await?);
    differences.extend(store::find_wrong_deadlines(&mut tx).await?);
    differences.extend(store::find_lost_events(&mut tx).await?);
    let (orders, units_received) = store::read_totals(&mut tx).await?;
    tx.rollback().await?;
    Ok(Report {
        differences,
        orders,
        units_received,
    })
}

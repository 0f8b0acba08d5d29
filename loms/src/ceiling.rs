//! What the database alone can do: the very writes of CreateOrder and of the relay, without callers, doors and broker.
//! `devstack ceiling` sets a load's figure beside this one.

use std::time::Duration;

use anyhow::Context as _;
use platform::{config::PostgresConfig, error::Fields, pg};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    batch::{IdempotencyKey, NewOrder, OrderIds, place_batch},
    order::{Lines, UserId},
    store::outbox,
};

/// Events taken out by one transaction, as the relay does by default.
const RELAYED: i64 = 1_000;
/// Longer than any run: expiry is another load.
const PAYMENT_TIMEOUT: Duration = Duration::from_secs(3600);
/// The relay's, by default.
const LEASE: Duration = Duration::from_secs(16);
/// The relay's, by default.
const PARTITIONER: &str = "consistent_random";
/// The relay's pause when it finds nothing.
const IDLE: Duration = Duration::from_millis(5);

/// An order to be written: user, `(SKU, units)`, idempotency key.
pub type Draw = (i64, Vec<(u32, u32)>, String);

/// Writes orders in batches of `batch` for as long as `warmup` and `measured` say, while another connection takes their
/// events out; returns the orders a second of the measured time.
///
/// # Errors
/// An order that is none, or a database that fails.
pub async fn ceiling(
    postgres: &PostgresConfig,
    batch: usize,
    (warmup, measured): (Duration, Duration),
    draw: impl FnMut() -> Draw,
) -> anyhow::Result<f64> {
    let began = Instant::now();
    let window = (began + warmup, began + warmup + measured);
    tokio::select! {
        written = write(postgres, batch, window, draw) => Ok(written? as f64 / measured.as_secs_f64()),
        relayed = relay(postgres) => relayed.map(|never| match never {}),
    }
}

async fn write(
    postgres: &PostgresConfig,
    batch: usize,
    (from, until): (Instant, Instant),
    mut draw: impl FnMut() -> Draw,
) -> anyhow::Result<u64> {
    let mut db = pg::connect_as(postgres, "loms-ceiling").await?;
    let (mut written, mut ids) = (0, OrderIds::default());
    while Instant::now() < until {
        let orders = (0..batch)
            .map(|_| order(draw()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut tx = db.begin().await?;
        let placed = place_batch(&mut tx, &orders, &mut ids, PAYMENT_TIMEOUT).await?;
        anyhow::ensure!(placed.is_some(), "keys were swept while they were claimed");
        tx.commit().await?;
        let now = Instant::now();
        if now >= from && now < until {
            written += orders.len() as u64;
        }
    }
    Ok(written)
}

async fn relay(postgres: &PostgresConfig) -> anyhow::Result<std::convert::Infallible> {
    let mut db = pg::connect_as(postgres, "loms-ceiling-relay").await?;
    let holder = Uuid::new_v4();
    loop {
        let mut tx = db.begin().await?;
        outbox::try_lock_relay(&mut tx).await?;
        let rows = outbox::read_leased(&mut tx, holder, LEASE, RELAYED, PARTITIONER).await?;
        tx.commit().await?;
        if rows.is_empty() {
            tokio::time::sleep(IDLE).await;
            continue;
        }
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let mut tx = db.begin().await?;
        outbox::delete_sent(&mut tx, &ids).await?;
        tx.commit().await?;
    }
}

fn order((user, items, key): Draw) -> anyhow::Result<NewOrder> {
    let lines = Lines::parse(&items, &mut Fields::new()).context("no lines")?;
    Ok(NewOrder {
        user: UserId::new(user).context("no user")?,
        lines,
        key: Some(IdempotencyKey {
            key,
            body_hash: [0; 32],
        }),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
    })
}

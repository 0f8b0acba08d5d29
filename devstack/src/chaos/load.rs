//! The load: who calls, how many, and how it ends.

use std::{
    fmt::Write as _,
    sync::{Arc, atomic::AtomicI64},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    buyers::{deliver, look, order},
    calls::{Caller, Ledger},
    shoppers::shop,
};
use crate::{retail, stack::Stack};

/// Warehouses 1 to this.
pub(super) const WAREHOUSES: i64 = 3;
/// Few enough that orders meet at the same rows.
const SKUS: usize = 24;
/// Units of an SKU in a warehouse at the beginning: few, so that some orders fail.
const FIRST_UNITS: i64 = 15;
/// Users of the cart have numbers below, each order straight to LOMS has a user above.
pub(super) const FIRST_BUYER: i64 = 1_000_000;
/// Between closing and giving up what has still no answer.
const LAST_TRIES: Duration = Duration::from_secs(45);

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub shoppers: usize,
    pub buyers: usize,
    /// Of a thousand calls, so many are left by their caller before there is an answer.
    pub impatience: u32,
}

impl Default for Load {
    fn default() -> Load {
        Load {
            shoppers: 8,
            buyers: 8,
            impatience: 20,
        }
    }
}

/// What is sold: a few SKUs of the retail catalogue, the first ones much more often.
#[derive(Debug, Clone)]
pub(super) struct Shelf(Arc<Vec<u32>>);

impl Shelf {
    fn of_the_catalogue() -> Result<Shelf> {
        let catalogue = retail::catalogue(retail::PRODUCTS_CSV)?;
        let skus: Vec<_> = catalogue.into_keys().take(SKUS).collect();
        Ok(Shelf(Arc::new(skus)))
    }

    pub(super) fn pick(&self, random: &mut StdRng) -> u32 {
        let place = random.random::<f64>().powi(2) * self.0.len() as f64;
        self.0[(place as usize).min(self.0.len() - 1)]
    }
}

/// Callers at work.
pub(super) struct Running {
    pub ledger: Arc<Ledger>,
    callers: JoinSet<()>,
    closing: CancellationToken,
    closed: CancellationToken,
}

/// Fills the shelves and starts the callers, whose choices follow from the seed.
pub(super) async fn start(stack: &Stack, load: Load, seed: u64) -> Result<Running> {
    let shelf = Shelf::of_the_catalogue()?;
    let file = stack.dir().join("shelves.csv");
    std::fs::write(&file, first_delivery(&shelf)?).context("write the first delivery")?;
    stack.receive_stock(&file).await?;

    let ledger = Arc::new(Ledger::default());
    let (closing, closed) = (CancellationToken::new(), CancellationToken::new());
    let mut callers = JoinSet::new();
    let caller = |number: u64| -> Result<Caller> {
        Ok(Caller {
            // a connection each, as separate clients have
            clients: stack.clients()?,
            ledger: ledger.clone(),
            random: StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(number)),
            closing: closing.clone(),
            closed: closed.clone(),
            impatience: load.impatience,
        })
    };
    let users = Arc::new(AtomicI64::new(1));
    let buyers = Arc::new(AtomicI64::new(FIRST_BUYER));
    for number in 0..load.shoppers {
        callers.spawn(shop(caller(number as u64)?, shelf.clone(), users.clone()));
    }
    for number in 0..load.buyers {
        let caller = caller(100 + number as u64)?;
        callers.spawn(order(caller, shelf.clone(), buyers.clone()));
    }
    for number in 0..2 {
        let first = i64::from(number) * 1_000_000;
        let caller = caller(200 + u64::from(number as u8))?;
        callers.spawn(deliver(caller, shelf.clone(), first));
    }
    callers.spawn(look(caller(300)?, shelf, buyers));
    Ok(Running {
        ledger,
        callers,
        closing,
        closed,
    })
}

fn first_delivery(shelf: &Shelf) -> Result<String> {
    let mut csv = "warehouse_id,sku,count\n".to_owned();
    for sku in shelf.0.iter() {
        for warehouse in 1..=WAREHOUSES {
            writeln!(csv, "{warehouse},{sku},{FIRST_UNITS}")?;
        }
    }
    Ok(csv)
}

impl Running {
    /// Lets everybody finish what they have begun; whoever insists in vain gives up after a while, which is noted.
    pub(super) async fn finish(mut self) -> Result<Arc<Ledger>> {
        self.closing.cancel();
        let closed = self.closed.clone();
        let mut giving_up = JoinSet::new();
        giving_up.spawn(async move {
            tokio::time::sleep(LAST_TRIES).await;
            closed.cancel();
        });
        while let Some(caller) = self.callers.join_next().await {
            caller.context("a caller panicked")?;
        }
        Ok(self.ledger)
    }
}

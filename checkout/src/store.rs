//! Every SQL statement of the service, a function each, by table group. Transactions belong to the use cases.
//!
//! Locks have one order: the cart's row, then the purchase's. Whoever locks a purchase alone (the worker's claim, one
//! row's update) takes nothing after it, so nobody can wait in a circle.

pub mod carts;
pub(crate) mod import;
pub mod purchases;
pub mod recovery;

use crate::cart::{Line, Quantity, Sku};

/// A line as the tables have it. The CHECKs of the tables make a failure here a bug, not an input.
fn line(sku: i64, count: i64) -> Result<Line, sqlx::Error> {
    let sku = u32::try_from(sku).ok().and_then(Sku::new);
    let quantity = u32::try_from(count).ok().and_then(Quantity::new);
    match (sku, quantity) {
        (Some(sku), Some(quantity)) => Ok(Line { sku, quantity }),
        _ => Err(decode("a line outside of its CHECKs")),
    }
}

fn decode(what: &'static str) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}

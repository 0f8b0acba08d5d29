//! Every SQL statement of the service, one function each, by the tables they are about. Whoever calls them owns the
//! transaction and takes locks in one order: idempotency keys by (user, key), order rows by id, stock rows by
//! (sku, warehouse_id).

pub(crate) mod audit;
pub(crate) mod import;
pub(crate) mod keys;
pub(crate) mod online;
pub(crate) mod orders;
pub(crate) mod outbox;
pub(crate) mod placement;
pub(crate) mod stock;

use crate::order::{Sku, Status};

/// A SKU as a column has it; the tables' checks make anything else impossible.
fn sku(column: i64) -> sqlx::Result<Sku> {
    Sku::from_db(column).ok_or_else(|| sqlx::Error::Decode(format!("{column} is no SKU").into()))
}

/// A count as a column has it.
fn units(column: i64) -> sqlx::Result<u64> {
    u64::try_from(column).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// A status, which every statement reads and writes as text. sqlx compares the names of types, and PostgreSQL prints them
/// with their schema or without as the user's `search_path` has it: `"$user"` made each decode of `loms.order_status` fail.
fn status(column: &str) -> sqlx::Result<Status> {
    Status::parse(column)
        .ok_or_else(|| sqlx::Error::Decode(format!("{column:?} is no status").into()))
}

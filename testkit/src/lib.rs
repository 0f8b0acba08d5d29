//! What the tests of several crates need: databases, each of its own test, owned by the user that
//! the service has in production, and the contract's RPCs. No service has this crate but as a
//! dev-dependency.

pub mod contract;
pub mod database;
pub mod owner;

pub use contract::rpcs;
pub use database::{admin, database, empty_database, url};

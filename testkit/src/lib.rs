//! What the tests of several crates need. So far: databases, each of its own test, owned by the user that the service has in
//! production. No service has this crate but as a dev-dependency.

pub mod database;
pub mod owner;

pub use database::{admin, database, empty_database, url};

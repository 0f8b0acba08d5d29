//! What the tests of several crates need: databases, each of its own test, owned by the user that
//! the service has in production; services as processes; HTTP/2 by hand, and attacks with it; the
//! contract's RPCs. No service has this crate but as a dev-dependency.

pub mod attack;
pub mod contract;
pub mod database;
pub mod http2;
pub mod owner;
pub mod process;

pub use contract::rpcs;
pub use database::{admin, database, empty_database, url};
pub use process::Process;

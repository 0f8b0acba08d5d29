//! LOMS: logistics and order management.
//!
//! `grpc` parses a call and asks a use case: `placement` (CreateOrder: a queue, and `batch`, which
//! writes many orders in one transaction), `payments` (OrderPayed, likewise), `orders` (cancel,
//! list), `stock` (what is on sale, deliveries), `audit` (the recount, and `sampled_audit`, which
//! does a little of it all the time). `order`, `allocation` and `delivery` are pure: which status
//! may follow which, which warehouse gives what, what may arrive. `store` holds every SQL
//! statement. Three workers run beside: `expiry` cancels what was not paid in time, `outbox`
//! carries events to Kafka as `event` writes them, `keys` sweeps old idempotency keys. `roles` says
//! who may call what. `app` puts it together, `import` takes over the orders of the system before,
//! and `crash` names the points at which tests end the process.

mod abandon;
mod allocation;
mod app;
mod audit;
mod batch;
mod ceiling;
mod config;
mod crash;
mod delivery;
mod error;
mod event;
mod expiry;
mod grpc;
mod import;
mod keys;
mod order;
mod orders;
mod outbox;
mod payments;
mod placement;
mod roles;
mod sampled_audit;
mod stock;
mod store;

pub use app::{App, MIGRATOR, migrate};
pub use audit::audit;
pub use ceiling::{Draw, ceiling};
pub use config::Config;
pub use crash::CrashPoint;
pub use import::import;
pub use roles::METHODS;
pub use stock::receive_file;

//! LOMS: logistics and order management.
//!
//! `grpc` parses a call and asks a use case: `placement` (CreateOrder: a queue, and `batch`, which writes many orders in
//! one transaction), `orders` (pay, cancel, list), `stock` (what is on sale, deliveries), `audit` (the recount). `order`,
//! `allocation` and `delivery` are pure: which status may follow which, which warehouse gives what, what may arrive.
//! `store` holds every SQL statement. Two workers run beside: `expiry` cancels what was not paid in time, `outbox` carries
//! events to Kafka as `event` writes them. `app` puts it together.

mod allocation;
mod app;
mod audit;
mod batch;
mod config;
mod delivery;
mod error;
mod event;
mod expiry;
mod grpc;
mod order;
mod orders;
mod outbox;
mod placement;
mod stock;
mod store;

pub use app::{App, MIGRATOR};
pub use audit::audit;
pub use config::Config;
pub use stock::receive_file;

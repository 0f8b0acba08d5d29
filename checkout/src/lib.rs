//! The map of checkout, a user's cart and the purchase: `grpc` parses and answers; `carts` and
//! `purchases` are what it can do, `sending` is what LOMS may be sent for a purchase, `recovery`
//! finishes what purchases left open; `cart` and `purchase` decide without I/O; `store` has the
//! SQL, `clients` the neighbours; `import` takes over the carts of the system before; `app` puts it
//! together.

pub mod app;
pub mod config;
pub mod error;
pub mod grpc;
pub mod roles;

pub mod carts;
pub mod import;
pub mod purchases;
pub mod recovery;
pub mod sending;

pub mod cart;
pub mod purchase;

pub mod clients;
pub mod store;

pub mod metrics;

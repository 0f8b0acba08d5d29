//! Plumbing shared by the services, without a business word: how a process starts, listens, calls, stores, sends,
//! shows what it does and stops. What only one service uses lives in that service.

mod admission;
mod body;
pub mod bounds;
mod call;
mod certificates;
pub mod client;
pub mod command;
pub mod config;
mod connect;
mod deadline;
mod docs;
mod drain;
pub mod error;
mod gelf;
pub mod grpc;
pub mod http;
pub mod import;
pub mod json;
pub mod kafka;
mod line;
mod listen;
mod log;
pub mod migrate;
pub mod peer;
pub mod pg;
pub mod process;
pub mod readiness;
pub mod roles;
mod sections;
pub mod server;
mod standard;
pub mod state_log;
pub mod tasks;
pub mod telemetry;
#[cfg(test)]
mod test_authority;
mod tls;
mod transport;

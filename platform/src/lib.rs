//! Plumbing shared by the services, without a business word: how a process starts, listens, calls, stores, sends,
//! shows what it does and stops. What only one service uses lives in that service.

pub mod client;
pub mod config;
pub mod error;
pub mod grpc;
pub mod http;
pub mod kafka;
pub mod pg;
pub mod process;
pub mod readiness;
pub mod server;
pub mod tasks;
pub mod telemetry;

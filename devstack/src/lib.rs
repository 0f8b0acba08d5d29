//! What only developers and operators run: the whole system on one machine, a walk through it, a replay of real orders.
//!
//! `cli` names the commands. `stack` starts everything out of the parts below it: `postgres`, `broker`, `products`,
//! `certs`, `service`. `demo`, `up`, `replay` and `chaos` use a stack through `clients`, as any caller would.

pub mod cli;
pub mod failure;

pub mod chaos;
pub mod demo;
pub mod load;
pub mod replay;
pub mod up;

pub mod clients;
pub mod stack;

pub mod bench;
pub mod binaries;
pub mod broker;
pub mod certs;
pub mod kafka;
pub mod kafka_owner;
pub mod mock_owner;
mod owner;
pub mod ports;
pub mod postgres;
pub mod postgres_owner;
pub mod products;
pub mod retail;
pub mod service;
pub mod signals;

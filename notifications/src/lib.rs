//! Notifications: consumes order events, tells people, keeps the history.
//!
//! In: `inbox` (with `assignment`; `starts` is where reading begins) polls, `hand` is what it has
//! read, `saving` writes what is not `known`, `dead_letters` takes what cannot be saved to its
//! table and topic (`letter` is what one says), `listing` shows it, `replay` puts it back. Out:
//! `delivery` sends what is untold on its way (`flights`) through `telegram`, `verdict` says what
//! came of it. Asked: `grpc` -> `history`. `import` takes over the messages of the system before.
//! All SQL is in `store`. What an event is and what people read of it: `event`, `message`.

pub mod app;
pub mod assignment;
pub mod config;
pub mod dead_letters;
pub mod delivery;
pub mod error;
pub mod event;
pub mod flights;
pub mod grpc;
mod hand;
pub mod history;
pub mod import;
pub mod inbox;
pub mod known;
mod lag;
pub mod letter;
pub mod listing;
pub mod message;
pub mod replay;
pub mod roles;
pub mod saving;
pub mod starts;
pub mod store;
pub mod telegram;
pub mod verdict;

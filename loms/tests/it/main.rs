//! LOMS as its callers meet it: gRPC and HTTP in front, a real PostgreSQL and the Kafka protocol behind. The oracle of
//! every test recounts the raw tables and the log, never what the service says of itself.
//!
//! `LOMS_TEST_SCALE=10` makes the tests of load ten times as large, or as long. What is drawn by chance comes from a seed that
//! a failing test prints; `LOMS_TEST_SEED` sets it.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]
#![expect(clippy::too_many_lines, reason = "a story is read from top to bottom")]

mod kafka;
mod oracle;
mod process;
mod proxy;
mod roles;
mod target;
mod test_app;
mod traders;
mod unread;

mod purchase;

mod http;
mod http_bodies;
mod refusals;
mod standard;

mod connection;
mod conservation;
mod contention;
mod databases;
mod import;
#[cfg(feature = "failpoints")]
mod import_crashes;
mod import_oracle;
mod import_source;
mod keys;
mod keys_sweep;
mod lost_answers;
mod races;

mod model;
mod shop;

mod deliveries;
mod expiry;

mod abandon;
mod attacks;
mod audit;
mod events;
mod plans;

mod cli;
mod crashes;
mod limits;
mod migrate;
mod migrations;
mod outages;
#[cfg(feature = "failpoints")]
mod panics;
mod partitioner;
mod payments;
mod relay;
mod shutdown;
mod silence;

/// A database of the test's own and its owner, the user of `config.example.yaml`.
async fn database() -> sqlx::PgPool {
    testkit::database("loms", &loms::MIGRATOR).await
}

//! The service as its neighbours meet it: events come in through Kafka, questions through gRPC and HTTP, messages go out
//! to a stand-in of Telegram; the database is real.
//!
//! `NOTIFICATIONS_TEST_SCALE=10` makes the tests of load a tenth as large, 100 is all. What is drawn by chance comes from a
//! seed that a failing test prints; `NOTIFICATIONS_TEST_SEED` sets it.

#![expect(clippy::too_many_lines, reason = "a story is read from top to bottom")]

mod kafka;
mod proxy;
mod roles;
mod telegram;
mod test_app;

mod delivery;
mod flights;
mod history;
mod import;
mod inbox;
mod outages;
mod process;

mod attacks;
mod crashes;
mod dead_letters;
mod kept_letters;
mod rebalances;
mod redelivery;
mod starts;
mod traces;
mod unsequenced;

/// A database of the test's own and its owner, the user of `config.example.yaml`.
async fn database() -> sqlx::PgPool {
    testkit::database("notifications", &notifications::app::MIGRATOR).await
}

//! The service through its two doors, on a real PostgreSQL, between a LOMS and a ProductService that are real servers on
//! the wire and can be away, slow, limited or lose their answers.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]
#![expect(clippy::too_many_lines, reason = "a story is read from top to bottom")]

mod attacks;
mod carts;
mod concurrency;
mod crashes;
mod import;
mod keyless;
mod loms_ignoring_keys;
mod loms_stub;
mod metrics;
mod neighbours;
mod plans;
mod process;
mod product_limits;
mod products;
mod products_stub;
mod proxy;
mod purchases;
mod recovery;
mod refusals;
mod roles;
mod test_app;
mod tls;

/// A database of the test's own and its owner, the user of `config.example.yaml`.
async fn database() -> sqlx::PgPool {
    testkit::database("checkout", &checkout::app::MIGRATOR).await
}

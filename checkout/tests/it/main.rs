//! The service through its two doors, on a real PostgreSQL, between a LOMS and a ProductService that are real servers on
//! the wire and can be away, slow, limited or lose their answers.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

mod carts;
mod concurrency;
mod crashes;
mod loms_stub;
mod metrics;
mod neighbours;
mod plans;
mod process;
mod product_limits;
mod products;
mod products_stub;
mod products_tls;
mod proxy;
mod purchases;
mod recovery;
mod refusals;
mod test_app;

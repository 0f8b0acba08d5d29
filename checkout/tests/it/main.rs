//! The service through its two doors, on a real PostgreSQL, between a LOMS and a ProductService that are real servers on
//! the wire and can be away, slow, limited or lose their answers.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

mod carts;
mod crashes;
mod loms_stub;
mod products;
mod products_stub;
mod proxy;
mod purchases;
mod recovery;
mod refusals;
mod test_app;

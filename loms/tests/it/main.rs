//! LOMS as its callers meet it: gRPC and HTTP in front, a real PostgreSQL and the Kafka protocol behind. The oracle of
//! every test recounts the raw tables and the log, never what the service says of itself.

mod kafka;
mod oracle;
mod proxy;
mod test_app;

mod purchase;

mod http;
mod refusals;
mod standard;

mod keys;
mod races;

mod deliveries;
mod expiry;

mod audit;
mod events;

mod limits;
mod outages;
mod shutdown;

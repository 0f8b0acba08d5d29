//! The service as its neighbours meet it: events come in through Kafka, questions through gRPC and HTTP, messages go out
//! to a stand-in of Telegram; the database is real.

mod kafka;
mod telegram;
mod test_app;

mod delivery;
mod history;
mod inbox;
mod process;

//! What spans services, on the real ones: each test has a stack of its own.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]
#![expect(
    clippy::too_many_lines,
    reason = "a table of refusals is read from top to bottom"
)]

mod caller;
mod chaos;
mod deployments;
mod line;
mod promql;
mod replica;
mod scene;
mod spans;
mod standby;
mod test_stack;

mod bad_input;
mod brokers;
mod certificates;
mod certified;
mod command_line;
mod compose;
mod compose_containers;
mod compose_environment;
mod crashes;
#[cfg(feature = "deployments")]
mod dashboards;
mod docs;
mod gelf;
#[cfg(feature = "deployments")]
mod graylog;
mod images;
mod limits;
mod load;
mod make;
mod metrics;
mod migrations;
mod monitoring;
mod order_refusals;
mod outages;
mod owners;
#[cfg(feature = "deployments")]
mod poolers;
mod purchase;
mod purchase_crashes;
mod quiet_logs;
mod recount;
mod refusals;
#[cfg(feature = "deployments")]
mod releases;
mod replay;
mod restarts;
mod roles;
mod rolling;
mod stopping;
mod tls;
mod topics;
mod traces;

mod model;

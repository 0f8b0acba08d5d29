//! What an operator sees of the pools of a process.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use prometheus::{IntGauge, IntGaugeVec, Opts};

use crate::grpc::registered;

/// Counts for as long as it lives: a caller who leaves in the middle does not wait any more.
pub(super) struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Counted {
        gauge.inc();
        Counted(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What an operator sees of a pool.
pub(super) struct Gauges {
    pub(super) in_use: IntGauge,
    pub(super) idle: IntGauge,
    pub(super) abandoned: IntGauge,
    pub(super) waiting: IntGauge,
}

impl Gauges {
    pub(super) fn of(service: &'static str, application: &str) -> Gauges {
        let (connections, waiting) = families(service);
        Gauges {
            in_use: connections.with_label_values(&[application, "in_use"]),
            idle: connections.with_label_values(&[application, "idle"]),
            abandoned: connections.with_label_values(&[application, "abandoned"]),
            waiting: waiting.with_label_values(&[application]),
        }
    }
}

/// One pair of metrics a service, whatever the number of its pools.
fn families(service: &'static str) -> (IntGaugeVec, IntGaugeVec) {
    static KNOWN: LazyLock<Mutex<HashMap<&'static str, (IntGaugeVec, IntGaugeVec)>>> =
        LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let connections = Opts::new(
            format!("{service}_pool_connections"),
            "Connections to PostgreSQL by what they do.",
        );
        let waiting = Opts::new(
            format!("{service}_pool_waiting"),
            "Callers that wait for a connection.",
        );
        (
            registered(IntGaugeVec::new(connections, &["pool", "state"])),
            registered(IntGaugeVec::new(waiting, &["pool"])),
        )
    };
    known.entry(service).or_insert_with(make).clone()
}

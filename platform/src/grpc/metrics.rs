//! The histogram and the counter of every call, and how metrics are registered.

use std::{
    any::Any,
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use http::Request;
use prometheus::{CounterVec, HistogramOpts, HistogramVec, Opts};
use tonic::body::Body;
use tracing::{Span, field::Empty};

use crate::{error::go_name, telemetry};

#[derive(Clone)]
pub(super) struct Metrics {
    pub(super) response_time: HistogramVec,
    pub(super) requests: CounterVec,
}

impl Metrics {
    /// Registered once per service name: tests run several services, several times, in one process.
    pub(super) fn of(service: &'static str) -> Metrics {
        static KNOWN: LazyLock<Mutex<HashMap<&'static str, Metrics>>> =
            LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .entry(service)
            .or_insert_with(|| Metrics::new(service))
            .clone()
    }

    fn new(service: &'static str) -> Metrics {
        let response_time = HistogramOpts::new(
            format!("{service}_histogram_response_time_seconds"),
            "Time to answer a call, by code and full method.",
        )
        .buckets(seconds_buckets());
        let requests = Opts::new(
            format!("{service}_counter_requests_total"),
            "Calls that came in.",
        );
        Metrics {
            response_time: registered(HistogramVec::new(response_time, &["status", "method"])),
            requests: registered(CounterVec::new(requests, &["type"])),
        }
    }
}

/// 1 ms to 10 s, the range of a call.
pub fn seconds_buckets() -> Vec<f64> {
    vec![
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ]
}

/// Registers a metric at start.
///
/// # Panics
/// On a name that is taken or malformed: a mistake in the program, seen by its first test.
#[expect(
    clippy::expect_used,
    reason = "a malformed metric is a mistake in the program, not in its input"
)]
pub fn registered<M: prometheus::core::Collector + Clone + Any>(
    metric: prometheus::Result<M>,
) -> M {
    let metric = metric.expect("a well-formed metric");
    prometheus::register(Box::new(metric.clone())).expect("a metric name of its own");
    metric
}

/// The span of a call, a part of its caller's trace.
pub(super) fn span_of(request: &Request<Body>) -> Span {
    let method = request.uri().path();
    let span = tracing::info_span!("grpc.call", otel.name = %method, otel.kind = "server",
        otel.status_code = Empty, rpc.method = %method, rpc.code = Empty, order.id = Empty, user.id = Empty);
    if let Some(parent) = request
        .headers()
        .get("traceparent")
        .and_then(|value| value.to_str().ok())
    {
        telemetry::set_parent(&span, parent);
    }
    span
}

/// Records the code of a call in its span. Codes that an operator should look at mark the span as
/// an error.
pub(crate) fn record_code(span: &Span, code: tonic::Code) {
    span.record("rpc.code", go_name(code));
    if matches!(
        code,
        tonic::Code::Unknown
            | tonic::Code::DeadlineExceeded
            | tonic::Code::Internal
            | tonic::Code::Unavailable
            | tonic::Code::DataLoss
    ) {
        span.record("otel.status_code", "ERROR");
    }
}

//! The door: what every call goes through, whether it came over gRPC or HTTP. One span and trace id, a deadline, a limit
//! of calls in progress, panics caught, one histogram.

use std::{
    any::Any,
    collections::HashMap,
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Request, Response};
use prometheus::{CounterVec, HistogramOpts, HistogramVec, Opts};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;
use tracing::{Instrument as _, Span, field::Empty};

pub use crate::deadline::Deadline;
use crate::{
    config::Limits,
    drain::{Held, Pieces},
    error::{Code, Fault, go_name},
    peer::Peer,
    roles::Policy,
    telemetry,
};

/// The trace id of every answer.
pub const TRACE_ID: &str = "x-trace-id";

/// What every call of a service goes through; clones share the limit.
#[derive(Clone)]
pub struct Guard(Arc<Shared>);

struct Shared {
    in_flight: Arc<Semaphore>,
    /// Holds a token for each answer, until its last byte.
    answers: TaskTracker,
    request_timeout: Duration,
    policy: Policy,
    metrics: Metrics,
}

impl Guard {
    pub fn new(service: &'static str, limits: &Limits, policy: Policy) -> Guard {
        Guard(Arc::new(Shared {
            in_flight: Arc::new(Semaphore::new(limits.in_flight)),
            answers: TaskTracker::new(),
            request_timeout: limits.request_timeout,
            policy,
            metrics: Metrics::of(service),
        }))
    }

    /// Whether nobody may call without a certificate.
    pub(crate) fn needs_certificate(&self) -> bool {
        self.0.policy.needs_certificate()
    }

    /// Takes a place for a call whose message is yet to be read; it goes to the call as an extension of the request.
    pub(crate) fn admission(&self) -> Admission {
        let permit = self.0.in_flight.clone().try_acquire_owned();
        Admission(permit.ok().map(Arc::new))
    }

    /// Lets a call in: its caller may make it, and there is a place.
    fn admit(&self, request: &mut Request<Body>) -> Result<Arc<OwnedSemaphorePermit>, Fault> {
        let peer = request.extensions().get::<Peer>();
        let caller = self.0.policy.admit(request.uri().path(), peer)?;
        if let Some(caller) = caller {
            request.extensions_mut().insert(caller);
        }
        let admission = request.extensions_mut().remove::<Admission>();
        let Admission(permit) = admission.unwrap_or_else(|| self.admission());
        let full = "too many calls in progress, try again later";
        permit.ok_or_else(|| Fault::new(Code::ResourceExhausted, full))
    }

    /// Taken when a call begins, dropped when its answer has been sent.
    pub(crate) fn answer(&self) -> TaskTrackerToken {
        self.0.answers.token()
    }

    /// Resolves when every call that has begun has its answer. Calls may begin meanwhile, and after.
    pub(crate) async fn idle(&self) {
        self.0.answers.close();
        self.0.answers.wait().await;
    }

    /// The service behind the door; clone it for the in-process client of the HTTP side.
    pub fn wrap<S>(&self, service: S) -> Guarded<S> {
        Guarded {
            guard: self.clone(),
            inner: service,
        }
    }
}

/// A place among the calls in progress, or that none was free. Who comes with one takes no other.
#[derive(Clone)]
pub(crate) struct Admission(Option<Arc<OwnedSemaphorePermit>>);

impl Admission {
    pub(crate) fn is_granted(&self) -> bool {
        self.0.is_some()
    }
}

/// A tonic service behind a [`Guard`].
#[derive(Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let shared = self.guard.0.clone();
        // before there is a span: turning calls away must cost next to nothing, or it would be an overload of its own
        let permit = match self.guard.admit(&mut request) {
            Ok(permit) => permit,
            Err(fault) => {
                let refused = shared.turn_away(request.uri().path(), fault);
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        // the one that was polled ready goes with the call
        let ready = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, ready);
        let span = span_of(&request);
        Box::pin(admit(shared, permit, inner, request).instrument(span))
    }
}

fn span_of(request: &Request<Body>) -> Span {
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

async fn admit<S>(
    shared: Arc<Shared>,
    permit: Arc<OwnedSemaphorePermit>,
    inner: S,
    request: Request<Body>,
) -> Result<Response<Body>, Infallible>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let method = request.uri().path().to_owned();
    let (started, trace_id) = (Instant::now(), telemetry::trace_id());
    let answer = shared.answers.token();
    let response = bounded(&shared, inner, request).await;
    // a reader who takes his time holds up a stop, and nobody's call
    drop(permit);
    record_code(&Span::current(), code_of(response.headers()));
    let response = shared.finish(&method, started, &trace_id, response);
    Ok(response.map(|body| Body::new(Held::new(Pieces::of(body), answer))))
}

impl Shared {
    /// The answer to a call that is not let in, or finds no place.
    fn turn_away(&self, method: &str, fault: Fault) -> Response<Body> {
        let refused = Status::from(fault).into_http();
        self.finish(method, Instant::now(), &telemetry::trace_id(), refused)
    }

    /// Gives an answer its trace id, and counts it.
    fn finish(
        &self,
        method: &str,
        started: Instant,
        trace_id: &str,
        mut response: Response<Body>,
    ) -> Response<Body> {
        if let Ok(value) = HeaderValue::from_str(trace_id) {
            response.headers_mut().insert(TRACE_ID, value);
        }
        let (code, elapsed) = (code_of(response.headers()), started.elapsed());
        self.metrics.requests.with_label_values(&["router"]).inc();
        let label = self.policy.label(method);
        self.metrics
            .response_time
            .with_label_values(&[go_name(code), label])
            .observe(elapsed.as_secs_f64());
        tracing::debug!(rpc.method = %method, rpc.code = go_name(code), elapsed_ms = elapsed.as_millis() as u64, "call answered");
        response
    }
}

async fn bounded<S>(shared: &Shared, mut inner: S, mut request: Request<Body>) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let allowed = timeout_of(request.headers())
        .unwrap_or(shared.request_timeout)
        .min(shared.request_timeout);
    // tonic's own timer, started before ours, answers CANCELLED: ours must be the first
    let ours = allowed.saturating_sub(Duration::from_millis(5).min(allowed / 10));
    request.extensions_mut().insert(Deadline::after(ours));
    let answer = AssertUnwindSafe(inner.call(request)).catch_unwind();
    match tokio::time::timeout(ours, answer).await {
        Ok(Ok(Ok(response))) => response,
        Ok(Ok(Err(never))) => match never {},
        // logged and counted by the hook of the process
        Ok(Err(_panic)) => refuse(Code::Internal, "internal error"),
        Err(_) => refuse(
            Code::DeadlineExceeded,
            "the deadline passed before there was an answer",
        ),
    }
}

fn refuse(code: Code, message: &str) -> Response<Body> {
    Status::from(Fault::new(code, message)).into_http()
}

/// Notes how a call ended; what somebody should look at is an error to whoever reads the trace.
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

pub(crate) fn code_of(headers: &HeaderMap) -> tonic::Code {
    // an error without a body puts its status into the headers; an answer has it in its trailers, and is OK
    headers.get("grpc-status").map_or(tonic::Code::Ok, |value| {
        tonic::Code::from_bytes(value.as_bytes())
    })
}

/// How long the caller waits.
pub(crate) fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    grpc_timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

/// A `grpc-timeout` header: at most eight digits and a unit (gRPC over HTTP/2, "Requests").
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[derive(Clone)]
struct Metrics {
    response_time: HistogramVec,
    requests: CounterVec,
}

impl Metrics {
    /// Registered once per service name: tests run several services, several times, in one process.
    fn of(service: &'static str) -> Metrics {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_written() {
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(
            grpc_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "S", "123456789S", "-1S", "1s", "1", "é", "1é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}

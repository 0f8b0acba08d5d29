//! What every call goes through, whether it came over gRPC or HTTP: who may call, bounds of what is
//! taken on, one span and trace id, a deadline, panics caught, one histogram.

mod message;
mod metrics;

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use tokio::time::Instant;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;
use tracing::Instrument as _;

pub(crate) use self::metrics::record_code;
use self::metrics::{Metrics, span_of};
pub use self::metrics::{registered, seconds_buckets};
pub use crate::deadline::Deadline;
use crate::{
    admission::{Admission, Bound, Part, Share},
    call::Call,
    config::Limits,
    deadline::timeout_of,
    error::{Code, Fault, go_name},
    line::Answer,
    peer::Peer,
    roles::Policy,
    telemetry,
};

pub(crate) const GRPC_STATUS: &str = "grpc-status";
pub(crate) const DETAILS: &str = "grpc-status-details-bin";
/// The trace id of every answer.
pub const TRACE_ID: &str = "x-trace-id";

/// An answer of at most so many bytes is given whatever room there is, that of its request. Of what
/// writes, only an order without the stock has a larger one, and that may be placed again.
pub(crate) const SMALL_ANSWER: usize = 4 * 1024;

/// What every call of a service goes through; clones share the bounds.
#[derive(Clone)]
pub struct Guard(Arc<Shared>);

struct Shared {
    admission: Admission,
    /// Holds a token for each answer, until its last byte.
    answers: TaskTracker,
    leaving: AtomicBool,
    request_timeout: Duration,
    message_bytes: usize,
    policy: Policy,
    metrics: Metrics,
}

impl Guard {
    pub fn new(service: &'static str, limits: &Limits, policy: Policy) -> Guard {
        Guard(Arc::new(Shared {
            admission: Admission::new(limits),
            answers: TaskTracker::new(),
            leaving: AtomicBool::new(false),
            request_timeout: limits.request_timeout,
            message_bytes: limits.body_bytes,
            policy,
            metrics: Metrics::of(service),
        }))
    }

    /// Whether nobody may call without a certificate.
    pub(crate) fn needs_certificate(&self) -> bool {
        self.0.policy.needs_certificate()
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.0.admission
    }

    /// Whether a call may be read at all: its caller may make it, over a connection that is not one
    /// too many.
    fn admit(&self, request: &mut Request<Body>) -> Result<(), Fault> {
        if let Some(Refused(fault)) = request.extensions_mut().remove() {
            return Err(fault);
        }
        let peer = request.extensions().get::<Peer>();
        if peer.and_then(Peer::line).is_some_and(|line| line.is_over()) {
            return Err(Bound::Connections.into());
        }
        let caller = self.0.policy.admit(request.uri().path(), peer)?;
        if let Some(caller) = caller {
            request.extensions_mut().insert(caller);
        }
        Ok(())
    }

    /// From now on answers over HTTP end their connections: their callers should come back
    /// elsewhere.
    pub(crate) fn leave(&self) {
        self.0.leaving.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Relaxed)
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

/// That a call is refused before it is read; it comes with the request, so that it is counted by
/// its method.
#[derive(Clone)]
pub(crate) struct Refused(pub(crate) Fault);

/// That a call's bytes have their room already: it came over HTTP, and is made again in process.
#[derive(Clone)]
pub(crate) struct Roomy;

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
        if let Err(fault) = self.guard.admit(&mut request) {
            let refused = shared.turn_away(request.uri().path(), fault);
            return Box::pin(std::future::ready(Ok(refused)));
        }
        // the one that was polled ready goes with the call
        let ready = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, ready);
        Box::pin(answer(shared, inner, request).map(Ok))
    }
}

/// Reads the message, takes a place, does the call, makes room for the answer.
async fn answer<S>(shared: Arc<Shared>, inner: S, request: Request<Body>) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let started = Instant::now();
    let token = shared.answers.token();
    let counted = Unanswered {
        shared: &shared,
        method: request.uri().path().to_owned(),
        started,
        answered: false,
    };
    let peer = request.extensions().get::<Peer>().cloned();
    let line = peer.as_ref().and_then(Peer::line);
    let share = line.map_or_else(Arc::default, |line| line.share().clone());
    // the answer to a call that came over HTTP is read at once, in process
    let (bytes_of, line) = match request.extensions().get::<Roomy>() {
        Some(Roomy) => (Arc::default(), None),
        None => (share.clone(), line.cloned()),
    };
    let allowed = timeout_of(request.headers())
        .unwrap_or(shared.request_timeout)
        .min(shared.request_timeout);
    // in time for the answer to be there before its caller gives up
    let by = started + allowed.saturating_sub(Duration::from_millis(5).min(allowed / 10));

    let (head, body) = request.into_parts();
    let headers = match message::room_of_headers(&head.headers, &shared.admission, &bytes_of) {
        Ok(held) => held,
        Err(fault) => return counted.turn_away(fault),
    };
    let read = message::read(body, shared.message_bytes, &shared.admission, &bytes_of);
    let read = tokio::time::timeout_at(by, read).await;
    let read = read.unwrap_or_else(|_| Err(late()));
    let place = read.and_then(|message| {
        let place = shared.admission.place(&share)?;
        Ok((message, place))
    });
    let (message, place) = match place {
        Ok(read) => read,
        Err(fault) => return counted.turn_away(fault),
    };
    let mut request = Request::from_parts(head, Body::new(Full::new(message.data)));
    request.extensions_mut().insert(Deadline::at(by));
    let span = span_of(&request);
    let trace_id = span.in_scope(telemetry::trace_id);
    let made = bounded(&shared, &bytes_of, (by, message.held), inner, request);
    let made = Call::new(share.peer, place).scope(made.instrument(span.clone()));
    let (mut head, made) = made.await;
    drop(headers);
    let line_of = line.as_deref();
    message::room_of_details(&mut head.headers, &shared.admission, &bytes_of, line_of);
    record_code(&span, code_of(&head.headers));
    let response = match made {
        Some(Made {
            data,
            trailers,
            held,
        }) => {
            let answer = Answer::new(data, trailers, held, token, line);
            Response::from_parts(head, Body::new(answer))
        }
        None => Response::from_parts(head, Body::empty()),
    };
    span.in_scope(|| counted.finish(&trace_id, response))
}

/// An answer's message, and the room that it takes.
struct Made {
    data: Bytes,
    trailers: Option<HeaderMap>,
    held: Part,
}

/// Does the call within its time, and has its whole answer.
async fn bounded<S>(
    shared: &Shared,
    share: &Arc<Share>,
    (by, request_held): (Instant, Part),
    mut inner: S,
    request: Request<Body>,
) -> (http::response::Parts, Option<Made>)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let called = async {
        let response = match inner.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let (head, body) = response.into_parts();
        (head, body.collect().await)
    };
    let called = AssertUnwindSafe(called).catch_unwind();
    let refused = |fault: Fault| (Status::from(fault).into_http::<()>().into_parts().0, None);
    match tokio::time::timeout_at(by, called).await {
        Ok(Ok((head, Ok(collected)))) => {
            if let Some(fault) = message::unreadable(&head.headers) {
                return refused(fault);
            }
            let trailers = collected.trailers().cloned();
            let data = collected.to_bytes();
            let held = match shared.admission.bytes(share, data.len()) {
                // its work is done: a caller who is refused now would ask for it again
                Err(_) if data.len() <= SMALL_ANSWER => Ok(request_held),
                held => held,
            };
            match held {
                Ok(held) => (
                    head,
                    Some(Made {
                        data,
                        trailers,
                        held,
                    }),
                ),
                Err(bound) => refused(bound.into()),
            }
        }
        // an answer of ours is made whole, or is none
        Ok(Ok((_, Err(_)))) => refused(Fault::new(Code::Internal, "internal error")),
        // logged and counted by the hook of the process
        Ok(Err(_panic)) => refused(Fault::new(Code::Internal, "internal error")),
        Err(_) => refused(late()),
    }
}

fn late() -> Fault {
    let message = "the deadline passed before there was an answer";
    Fault::new(Code::DeadlineExceeded, message)
}

/// Counts a call whose caller leaves before there is an answer.
struct Unanswered<'a> {
    shared: &'a Shared,
    method: String,
    started: Instant,
    answered: bool,
}

impl Unanswered<'_> {
    fn turn_away(mut self, fault: Fault) -> Response<Body> {
        self.answered = true;
        self.shared.turn_away(&self.method, fault)
    }

    fn finish(mut self, trace_id: &str, response: Response<Body>) -> Response<Body> {
        self.answered = true;
        self.shared
            .finish(&self.method, self.started, trace_id, response)
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.shared
                .count(&self.method, tonic::Code::Cancelled, self.started);
        }
    }
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
        self.count(method, code_of(response.headers()), started);
        response
    }

    fn count(&self, method: &str, code: tonic::Code, started: Instant) {
        let elapsed = started.elapsed();
        self.metrics.requests.with_label_values(&["router"]).inc();
        let label = self.policy.label(method);
        self.metrics
            .response_time
            .with_label_values(&[go_name(code), label])
            .observe(elapsed.as_secs_f64());
        tracing::debug!(rpc.method = %method, rpc.code = go_name(code), elapsed_ms = elapsed.as_millis() as u64, "call answered");
    }
}

pub(crate) fn code_of(headers: &HeaderMap) -> tonic::Code {
    // an error without a body puts its status into the headers; an answer has it in its trailers, and is OK
    headers.get(GRPC_STATUS).map_or(tonic::Code::Ok, |value| {
        tonic::Code::from_bytes(value.as_bytes())
    })
}

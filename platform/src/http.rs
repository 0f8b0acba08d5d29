//! JSON over HTTP as grpc-gateway v2 speaks it. A route turns the body into the message, calls the same gRPC service in
//! process, and turns the answer back, so that both doors share one set of layers.

use std::{future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::{Body, HttpBody as _},
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
    routing::{MethodRouter, get, post},
};
use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use prometheus::{Encoder as _, TextEncoder};
use prost::{Message, Name};
use prost_reflect::DescriptorPool;
use serde::Serialize;
use serde_json::{Value, json};
use tonic::Status;
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    admission::{Part, Share},
    body::{self, Bounds},
    config::{ErrorsConfig, Limits},
    deadline, docs,
    drain::{Answering, Held, Room, Unsent},
    error::{self, Fault},
    grpc::{Guard, Refused, Roomy, SMALL_ANSWER, TRACE_ID},
    json,
    peer::Peer,
    readiness::Health,
    roles, telemetry,
};

/// Bytes of a body, unless its route says otherwise: ten times those of any request without a list.
const BODY_BYTES: usize = 16 * 1024;

/// A POST route for one RPC, with a body of at most 16 KiB. `call` is the generated client's method
/// over the guarded service.
pub fn rpc<Req, Resp, F, Fut>(call: F) -> MethodRouter
where
    Req: Message + Name + Default + 'static,
    Resp: Serialize + Send + 'static,
    F: Fn(tonic::Request<Req>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<tonic::Response<Resp>, Status>> + Send + 'static,
{
    rpc_with_body(BODY_BYTES, call)
}

/// [`rpc`] with a body of at most `body_bytes`, and of `limits.body_bytes`.
pub fn rpc_with_body<Req, Resp, F, Fut>(body_bytes: usize, call: F) -> MethodRouter
where
    Req: Message + Name + Default + 'static,
    Resp: Serialize + Send + 'static,
    F: Fn(tonic::Request<Req>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<tonic::Response<Resp>, Status>> + Send + 'static,
{
    post(
        async move |Extension(door): Extension<Door>, request: Request| {
            let answered = answer(call, &door, body_bytes, request).await;
            answered.unwrap_or_else(|refused| refused)
        },
    )
}

async fn answer<Req, Resp, F, Fut>(
    call: F,
    door: &Door,
    body_bytes: usize,
    request: Request,
) -> Result<Response, Response>
where
    Req: Message + Name + Default,
    Resp: Serialize,
    F: Fn(tonic::Request<Req>) -> Fut,
    Fut: Future<Output = Result<tonic::Response<Resp>, Status>>,
{
    let (head, body) = request.into_parts();
    let peer = head.extensions.get::<Peer>().cloned().unwrap_or_default();
    let share = peer
        .line()
        .map_or_else(Arc::default, |line| line.share().clone());
    let bounds = door.bounds(body_bytes);
    // one for whose body there is no room, or that shows no certificate where one is needed, is
    // turned away by the guard, which knows its method, and its body is not read
    let room = if peer.is_verified() || !door.guard.needs_certificate() {
        deadline::forwarded(&head.headers).and_then(|timeout| {
            let room = door.room(&body, bounds.bytes, &share)?;
            Ok((room, timeout))
        })
    } else {
        Err(roles::certificate_required())
    };
    let unread = room.is_err() && !body::is_small(&body);
    let mut outgoing = match &room {
        Ok(_) => {
            let body = body::receive(&head.headers, body, bounds).await?;
            let message = door.message(&body);
            tonic::Request::new(message.map_err(|fault| door.refusal(fault.into()))?)
        }
        Err(fault) => {
            let mut unread = tonic::Request::new(Req::default());
            unread.extensions_mut().insert(Refused(fault.clone()));
            unread
        }
    };
    outgoing.extensions_mut().insert(peer);
    outgoing.extensions_mut().insert(Roomy);
    if let Some(parent) = telemetry::traceparent().and_then(|text| text.parse().ok()) {
        outgoing.metadata_mut().insert("traceparent", parent);
    }
    if let Ok((_, Some(timeout))) = &room {
        outgoing
            .metadata_mut()
            .insert("grpc-timeout", timeout.clone());
    }
    match call(outgoing).await {
        Ok(response) => {
            let made = serde_json::to_value(response.into_inner()).unwrap_or_default();
            drop(room);
            Ok(door.with_room(reply(StatusCode::OK, &made), &share))
        }
        Err(status) => {
            let mut refused = door.refusal(status);
            if unread {
                body::close(&mut refused);
            }
            Err(refused)
        }
    }
}

/// What a route knows of the door that it is behind.
#[derive(Clone)]
struct Door {
    guard: Guard,
    contract: DescriptorPool,
    /// Of any body.
    body_bytes: usize,
    /// For the whole of a body to arrive.
    body_time: Duration,
    /// Whether refusals have details.
    details: bool,
}

impl Door {
    /// Room for a body: what it says it has, or as much as one may have.
    fn room(&self, body: &Body, most: usize, share: &Arc<Share>) -> Result<Part, Fault> {
        let exact = body.size_hint().exact();
        let exact = exact.and_then(|bytes| usize::try_from(bytes).ok());
        let bytes = exact.unwrap_or(most).min(most);
        let room = self.guard.admission().bytes(share, bytes);
        room.map_err(Fault::from)
    }

    /// The answer with the room that it takes until it is sent.
    fn with_room(&self, mut made: Response, share: &Arc<Share>) -> Response {
        let bytes = made.body().size_hint().lower() as usize;
        match self.guard.admission().bytes(share, bytes) {
            Ok(held) => {
                made.extensions_mut().insert(Room(Arc::new(held)));
                made
            }
            // its work is done: a caller who is refused now would ask for it again
            Err(_) if bytes <= SMALL_ANSWER => made,
            Err(bound) => self.refusal(Fault::from(bound).into()),
        }
    }

    fn refusal(&self, status: Status) -> Response {
        let told = match self.details {
            true => status,
            false => Status::new(status.code(), status.message()),
        };
        reply(error::http_status(told.code()), &error::json_body(&told))
    }

    fn bounds(&self, body_bytes: usize) -> Bounds {
        Bounds {
            bytes: body_bytes.min(self.body_bytes),
            discarded: self.body_bytes.saturating_mul(DISCARDED_LIMITS),
            time: self.body_time,
        }
    }

    fn message<Req: Message + Name + Default>(&self, body: &[u8]) -> Result<Req, Fault> {
        let name = Req::full_name();
        let Some(shape) = self.contract.get_message_by_name(&name) else {
            tracing::error!(message = name, "a route's request is not in the contract");
            return Err(Fault::new(error::Code::Internal, "internal error"));
        };
        json::read(&shape, body)
    }
}

/// What is read of a body over the limit, in `limits.body_bytes`.
const DISCARDED_LIMITS: usize = 4;

fn reply(status: StatusCode, body: &Value) -> Response {
    let mut response = (status, body.to_string()).into_response();
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

pub(crate) fn problem(status: StatusCode, code: tonic::Code, message: &str) -> Response {
    reply(
        status,
        &json!({"code": i32::from(code), "message": message, "details": []}),
    )
}

pub(crate) async fn not_found() -> Response {
    problem(StatusCode::NOT_FOUND, tonic::Code::NotFound, "Not Found")
}

/// `Allow` is what the route has methods for; axum adds it.
async fn method_not_allowed() -> Response {
    problem(
        StatusCode::METHOD_NOT_ALLOWED,
        tonic::Code::Unimplemented,
        "Method Not Allowed",
    )
}

/// Asked every few seconds by machines: traces of these would only hide the others.
const QUIET: [&str; 3] = ["/metrics", "/healthz", "/readyz"];

/// What every service has besides its routes: documentation, metrics, health. Nobody needs a certificate for these.
pub(crate) fn standard_routes(openapi: &'static str, health: Arc<Health>) -> Router {
    let ready = move || async move {
        let (ready, report) = health.report();
        reply(
            if ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            },
            &report,
        )
    };
    docs::router(openapi)
        .route("/metrics", get(metrics))
        .route(
            "/healthz",
            get(async || reply(StatusCode::OK, &json!({"status": "ok"}))),
        )
        .route("/readyz", get(ready))
}

/// The routes of a port with 404 and 405, the body limit and trace ids.
pub(crate) fn router(
    routes: Router,
    guard: Guard,
    contract: DescriptorPool,
    limits: &Limits,
    errors: ErrorsConfig,
) -> Router {
    routes
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(Door {
            guard: guard.clone(),
            contract,
            body_bytes: limits.body_bytes,
            body_time: limits.request_timeout,
            details: errors.details,
        }))
        .layer(axum::middleware::from_fn_with_state(guard, traced))
}

async fn metrics() -> Response {
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    if let Err(error) = encoder.encode(&prometheus::gather(), &mut text) {
        tracing::error!(error = %error, "metrics could not be encoded");
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    (
        [(header::CONTENT_TYPE, encoder.format_type().to_owned())],
        Body::from(text),
    )
        .into_response()
}

async fn traced(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let unsent = request.extensions_mut().remove::<Unsent>();
    let leaving = guard.is_leaving();
    let mut answering = Answering::new(guard.answer(), unsent.unwrap_or_default());
    let span = span_of(&request);
    if let Some(parent) = request
        .headers()
        .get("traceparent")
        .and_then(|value| value.to_str().ok())
    {
        telemetry::set_parent(&span, parent);
    }
    let trace_id = span.in_scope(telemetry::trace_id);
    let answer = AssertUnwindSafe(next.run(request).instrument(span.clone())).catch_unwind();
    // what panics inside the guard has its answer from there; logged and counted by the hook of the process, as there
    let mut response = answer.await.unwrap_or_else(|_panic| {
        problem(
            StatusCode::INTERNAL_SERVER_ERROR,
            tonic::Code::Internal,
            "internal error",
        )
    });
    answering.hold(response.extensions_mut().remove());
    span.record("http.status", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    stamp(response.headers_mut(), &trace_id);
    if leaving {
        body::close(&mut response);
    }
    response.map(|body| Body::new(Held::new(body, answering)))
}

fn span_of(request: &Request) -> Span {
    // a path that is no route is the caller's word: it must not become a name
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("unknown", MatchedPath::as_str);
    if QUIET.contains(&route) {
        return Span::none();
    }
    let name = format!("{} {route}", request.method());
    tracing::info_span!("http.request", otel.name = %name, otel.kind = "server", otel.status_code = Empty,
        http.route = %route, http.status = Empty)
}

fn stamp(headers: &mut HeaderMap, trace_id: &str) {
    if let Ok(value) = HeaderValue::from_str(trace_id) {
        headers.insert(TRACE_ID, value.clone());
        // old clients read these two, which grpc-gateway made of the gRPC headers
        headers.insert(HeaderName::from_static("grpc-metadata-x-trace-id"), value);
    }
    let grpc = HeaderValue::from_static("application/grpc");
    headers.insert(HeaderName::from_static("grpc-metadata-content-type"), grpc);
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{listen, roles::Policy, tasks, tls::Listener};

    #[tokio::test]
    async fn a_panic_in_a_route_is_an_answer_and_the_connection_lives() {
        let guard = Guard::new("routes", &Limits::default(), Policy::new(&[], None));
        let router = Router::new()
            .route("/broken", get(async || -> StatusCode { panic!("broken") }))
            .route("/whole", get(async || "whole"))
            .layer(axum::middleware::from_fn_with_state(guard, traced));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let closing = CancellationToken::new();
        let listener = Listener::unbounded(listener, None);
        let door = listen::serve_http(listener, router, Limits::default(), closing.clone());
        let door = tasks::spawn(door);

        let mut client = TcpStream::connect(address).await.unwrap();
        let calls = "GET /broken HTTP/1.1\r\nhost: x\r\n\r\n\
                     GET /whole HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        client.write_all(calls.as_bytes()).await.unwrap();
        let mut heard = String::new();
        client.read_to_string(&mut heard).await.unwrap();
        let (broken, whole) = heard.split_once("HTTP/1.1 200 OK").expect(&heard);
        assert!(broken.starts_with("HTTP/1.1 500"), "{heard}");
        assert!(broken.contains("\r\nx-trace-id: "), "{heard}");
        let body = r#"{"code":13,"message":"internal error","details":[]}"#;
        assert!(broken.ends_with(body), "{heard}");
        assert!(whole.ends_with("whole"), "{heard}");
        closing.cancel();
        door.await.unwrap();
    }
}

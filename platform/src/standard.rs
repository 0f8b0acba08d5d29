//! The standard gRPC services that every service has: health and reflection. They have bounds of
//! their own, because a full house must not look like a dead one.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Frame};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tonic::{Status, codec::CompressionEncoding, service::Routes};
use tonic_health::pb::health_server::HealthServer;

use crate::{
    admission::Bound,
    config::{ErrorsConfig, Limits},
    drain::Held,
    error::{Code, Fault},
    grpc::{DETAILS, GRPC_STATUS, Guard, TRACE_ID},
    peer::Peer,
    roles, telemetry,
};

/// Calls at once, and streams, which have no deadline: they end after `limits.connection_age`.
const CALLS: usize = 64;
const STREAMS: usize = 64;
/// Bytes of one message.
const MESSAGE_BYTES: usize = 64 * 1024;

/// What guards them; clones share the bounds.
#[derive(Clone)]
pub(crate) struct Standard(Arc<Inner>);

struct Inner {
    name: &'static str,
    /// The prefix of the paths that have their own guard.
    guarded: String,
    needs_certificate: bool,
    request_timeout: Duration,
    connection_age: Duration,
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Standard {
    /// Beside the service `name` behind `guard`.
    pub(crate) fn new(name: &'static str, guard: &Guard, limits: &Limits) -> Standard {
        Standard(Arc::new(Inner {
            name,
            guarded: format!("/{name}/"),
            needs_certificate: guard.needs_certificate(),
            request_timeout: limits.request_timeout,
            connection_age: limits.connection_age,
            calls: Arc::new(Semaphore::new(CALLS)),
            streams: Arc::new(Semaphore::new(STREAMS)),
        }))
    }

    /// The routes with health and reflection, which serves `descriptors`; every answer has a trace
    /// id.
    ///
    /// # Errors
    /// Descriptors that cannot be read.
    pub(crate) fn add_to<H>(
        self,
        routes: Routes,
        descriptors: &'static [u8],
        health: HealthServer<H>,
        errors: ErrorsConfig,
    ) -> anyhow::Result<Router>
    where
        H: tonic_health::pb::health_server::Health,
    {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(descriptors)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // so that tools can print the details of an error
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                // the descriptor set knows other services too; this port serves only these
                .with_service_name(self.0.name)
                .with_service_name("grpc.health.v1.Health")
        };
        // v1alpha is what grpcurl before 1.8.8 and other old tools ask for
        let v1 = reflection()
            .with_service_name("grpc.reflection.v1.ServerReflection")
            .build_v1()?;
        let v1alpha = reflection()
            .with_service_name("grpc.reflection.v1alpha.ServerReflection")
            .build_v1alpha()?;
        Ok(routes
            .add_service(
                health
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .accept_compressed(CompressionEncoding::Gzip),
            )
            .add_service(
                v1.max_decoding_message_size(MESSAGE_BYTES)
                    .accept_compressed(CompressionEncoding::Gzip),
            )
            .add_service(
                v1alpha
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .accept_compressed(CompressionEncoding::Gzip),
            )
            .into_axum_router()
            .layer(middleware::from_fn_with_state(self, guard))
            .layer(middleware::from_fn_with_state(errors, finish_grpc)))
    }

    fn admit(&self, request: &Request) -> Result<(OwnedSemaphorePermit, bool), Fault> {
        let inner = &self.0;
        let peer = request.extensions().get::<Peer>();
        if inner.needs_certificate && !peer.is_some_and(Peer::is_verified) {
            return Err(roles::certificate_required());
        }
        if peer.and_then(Peer::line).is_some_and(|line| line.is_over()) {
            return Err(Bound::Connections.into());
        }
        let is_unary = request.uri().path() == "/grpc.health.v1.Health/Check";
        let permits = if is_unary {
            &inner.calls
        } else {
            &inner.streams
        };
        let permit = permits.clone().try_acquire_owned();
        permit
            .map(|permit| (permit, is_unary))
            .map_err(|_| Bound::Calls.into())
    }
}

/// The body of a stream without an end of its own. After a time it ends with UNAVAILABLE: its
/// caller may ask again.
struct Aging {
    body: Body,
    until: Pin<Box<Sleep>>,
    ended: bool,
}

impl Aging {
    fn new(body: Body, age: Duration) -> Aging {
        Aging {
            body,
            until: Box::pin(tokio::time::sleep(age)),
            ended: false,
        }
    }
}

impl HttpBody for Aging {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.until.as_mut().poll(cx).is_pending() {
            return Pin::new(&mut self.body).poll_frame(cx);
        }
        self.ended = true;
        let old = Fault::new(Code::Unavailable, "the stream is old, begin another one");
        let mut trailers = HeaderMap::new();
        Status::from(old).add_header(&mut trailers).ok();
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

/// Gives every answer over gRPC its trace id as a header. tonic puts a refusal into one frame, of
/// which clients that tell headers from trailers, as grpc-go does, find all in the trailers: here
/// it becomes two. The id is in both, because clients of tonic see the trailers alone.
async fn finish_grpc(State(errors): State<ErrorsConfig>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&telemetry::trace_id()) {
        response.headers_mut().entry(TRACE_ID).or_insert(value);
    }
    if !response.headers().contains_key(GRPC_STATUS) {
        return response;
    }
    let (mut head, _empty) = response.into_parts();
    let mut trailers = std::mem::take(&mut head.headers);
    if !errors.details {
        trailers.remove(DETAILS);
    }
    let trace_id = (
        HeaderName::from_static(TRACE_ID),
        trailers.get(TRACE_ID).cloned(),
    );
    let content_type = (header::CONTENT_TYPE, trailers.remove(header::CONTENT_TYPE));
    for (name, value) in [trace_id, content_type] {
        head.headers.extend(value.map(|value| (name, value)));
    }
    let trailers = std::future::ready(Some(Ok(trailers)));
    let body = Empty::new().with_trailers(trailers);
    Response::from_parts(head, Body::new(body))
}

/// Bounds what is not behind the guard of the service.
async fn guard(State(standard): State<Standard>, request: Request, next: Next) -> Response {
    if request.uri().path().starts_with(&standard.0.guarded) {
        return next.run(request).await;
    }
    let (permit, is_unary) = match standard.admit(&request) {
        Ok(admitted) => admitted,
        Err(fault) => return Status::from(fault).into_http(),
    };
    let answered = if is_unary {
        tokio::time::timeout(standard.0.request_timeout, next.run(request)).await
    } else {
        Ok(next.run(request).await)
    };
    match answered {
        // a small answer is made, and may wait for its reader without keeping others from theirs
        Ok(response) if is_unary => response,
        Ok(response) => response.map(|body| {
            let body = Aging::new(body, standard.0.connection_age);
            Body::new(Held::new(body, permit))
        }),
        Err(_) => {
            let late = "the deadline passed before there was an answer";
            Status::from(Fault::new(Code::DeadlineExceeded, late)).into_http()
        }
    }
}

//! The connections of a port, over HTTP/1 or HTTP/2. Neither axum's `serve` nor tonic's limits all
//! that a connection may make us hold, or how long it may be silent; hyper's builder does.

use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio_io_timeout::TimeoutWriter;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{
    config::Limits,
    drain::{Socket, Unsent},
    tasks,
    tls::Listener,
};

/// hyper refuses less, whatever the headers are.
const LEAST_BUFFER: usize = 8192;
/// For the answer to a ping.
pub(crate) const PING_BOUND: Duration = Duration::from_secs(10);

/// JSON over HTTP/1; see [`serve`].
pub(crate) async fn serve_http(
    listener: Listener,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
) {
    serve(listener, router, &http1(&limits), &limits, closing).await;
}

/// gRPC over HTTP/2; see [`serve`].
pub(crate) async fn serve_grpc(
    listener: Listener,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
) {
    serve(listener, router, &http2(&limits), &limits, closing).await;
}

/// Serves `router` until `closing`, then lets the connections finish what they have begun. Every
/// request knows its peer.
async fn serve(
    mut listener: Listener,
    router: Router,
    builder: &auto::Builder<TokioExecutor>,
    limits: &Limits,
    closing: CancellationToken,
) {
    let connections = GracefulShutdown::new();
    loop {
        let stream = tokio::select! {
            () = closing.cancelled() => break,
            stream = listener.next() => stream,
        };
        let (peer, unsent) = (stream.peer(), Unsent::default());
        // a reader that takes nothing is left
        let mut socket = TimeoutWriter::new(Socket::new(stream, unsent.clone()));
        socket.set_timeout(Some(limits.write_timeout));
        let socket = Box::pin(socket);
        let service = router
            .clone()
            .map_request(move |mut request: hyper::Request<Incoming>| {
                request.extensions_mut().insert(unsent.clone());
                request.extensions_mut().insert(peer.clone());
                request.map(axum::body::Body::new)
            });
        let connection = builder
            .serve_connection(TokioIo::new(socket), TowerToHyperService::new(service))
            .into_owned();
        let connection = connections.watch(connection);
        tasks::spawn(async move {
            // a client that breaks off, or sends what is no HTTP, is its own business
            if let Err(error) = connection.await {
                tracing::debug!(error = %error, "connection ended early");
            }
        });
    }
    drop(listener);
    connections.shutdown().await;
}

fn http1(limits: &Limits) -> auto::Builder<TokioExecutor> {
    // HTTP/1 alone, and no upgrades: whoever has to find out which version a silent client speaks, as hyper does for a
    // connection with upgrades whatever it may speak, waits for its first byte without a bound
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    let buffer = LEAST_BUFFER.max(limits.header_bytes as usize);
    builder
        .http1()
        .timer(TokioTimer::new())
        // also runs while a connection waits for its next request
        .header_read_timeout(limits.idle_timeout)
        .max_buf_size(buffer);
    builder
}

/// Streams of a connection: a client with more calls waits with them, one that floods opens no
/// more.
const STREAMS: u32 = 128;
/// Resets that we are made to send, and streams that were reset before they were accepted: a
/// connection with more ends.
const LOCAL_RESETS: usize = 1024;
const PENDING_RESETS: usize = 20;
/// Bytes that a peer may send before they are read.
const CONNECTION_WINDOW: u32 = 256 * 1024;
const STREAM_WINDOW: u32 = 64 * 1024;

/// Bytes that a stream may keep before it takes more: it takes a piece of an answer when the one
/// before has left it, whatever window the peer has opened, and may take back later.
const SEND_BUFFER: usize = 1;
/// Bytes with which HTTP/2 begins, RFC 9113, 3.4.
pub(crate) const PREFACE: u64 = 24;

pub(crate) fn http2(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .max_pending_accept_reset_streams(Some(PENDING_RESETS))
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(limits.header_bytes)
        .keep_alive_interval(Some(limits.idle_timeout))
        .keep_alive_timeout(PING_BOUND);
    builder
}

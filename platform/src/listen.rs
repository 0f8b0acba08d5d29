//! The HTTP door's connections. axum's own `serve` has no limits on what a connection may hold or how long it may be
//! silent; hyper's builder has.

use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
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

/// Serves `router` until `closing`, then lets the connections finish what they have begun. Every request knows its peer.
pub(crate) async fn serve_http(
    mut listener: Listener,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
) {
    let builder = builder(&limits);
    let connections = GracefulShutdown::new();
    loop {
        let stream = tokio::select! {
            () = closing.cancelled() => break,
            stream = listener.next() => stream,
        };
        let (peer, unsent) = (stream.peer(), Unsent::default());
        let socket = Socket::new(stream, unsent.clone());
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

fn builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
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

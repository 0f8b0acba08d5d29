//! Connections to upstreams, over TLS where there is a CA: what is shown and what is trusted is read again when files change.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName, sign::SingleCertAndKey};
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service};

use crate::{
    certificates::{Files, Loaded, Watched, provider},
    client::Neighbour,
    error::StartError,
    tasks::Tasks,
    transport::Transport,
};

const ALPN: &[u8] = b"h2";

/// The TLS of calls to one upstream.
#[derive(Clone)]
pub(crate) struct ClientTls {
    watched: Arc<Watched<ClientConfig>>,
    name: ServerName<'static>,
}

impl ClientTls {
    /// Reads `files`; the certificate of the other side must be for `host`.
    ///
    /// # Errors
    /// A file that is missing or no good, by its name; a host that no certificate can be for.
    pub(crate) fn load(
        service: &'static str,
        files: Files,
        host: &str,
    ) -> Result<ClientTls, StartError> {
        // an address of IPv6 is in brackets
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(|error| {
            StartError::new(
                format!("TLS with {host}: {error}"),
                "write a host's name or address",
            )
        })?;
        let watched = Watched::load(service, files, |loaded| client_config(&loaded))?;
        Ok(ClientTls { watched, name })
    }

    pub(crate) fn watch(&self, every: Duration, tasks: &Tasks) {
        self.watched.watch("upstream certificates", every, tasks);
    }

    async fn connect(self, stream: TcpStream) -> Result<Transport, BoxError> {
        let connector = TlsConnector::from(self.watched.current());
        let stream = connector.connect(self.name, stream).await?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(ALPN) {
            return Err("the other side does not speak HTTP/2 over TLS".into());
        }
        Ok(Transport::tls(stream.into()))
    }
}

fn client_config(loaded: &Loaded) -> Result<ClientConfig, rustls::Error> {
    let roots = loaded.roots.clone();
    let roots = roots.unwrap_or_else(|| Arc::new(RootCertStore::empty()));
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match loaded.identity.clone() {
        Some(identity) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Connects, and remembers a host that does not answer. A channel connects for one waiting call at a time: a hundred
/// callers of a host that is gone would wait for a hundred time-outs, one after the other.
#[derive(Clone)]
pub(crate) struct Connect {
    tcp: HttpConnector,
    tls: Option<ClientTls>,
    timeout: Duration,
    /// For the handshake: the kernel accepts a connection at once, the process behind it may be busy.
    handshake_timeout: Duration,
    silent_until: Arc<Mutex<Instant>>,
}

impl Connect {
    pub(crate) fn new(neighbour: &Neighbour, tls: Option<ClientTls>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(neighbour.connect_timeout));
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        tcp.set_nodelay(true);
        Connect {
            tcp,
            tls,
            timeout: neighbour.connect_timeout,
            handshake_timeout: neighbour.timeout,
            silent_until: Arc::new(Mutex::new(Instant::now())),
        }
    }
}

impl Service<Uri> for Connect {
    type Response = TokioIo<Transport>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<TokioIo<Transport>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(BoxError::from)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (began, timeout) = (Instant::now(), self.timeout);
        if began < *locked(&self.silent_until) {
            let known = BoxError::from("the last attempt to connect had no answer");
            return Box::pin(std::future::ready(Err(known)));
        }
        let (connecting, silent_until) = (self.tcp.call(uri), self.silent_until.clone());
        let (tls, handshake_timeout) = (self.tls.clone(), self.handshake_timeout);
        Box::pin(async move {
            let connected = connecting.await;
            if connected.is_err() {
                // for as long again as it took: a refusal took no time, who restarts is asked again at once. Counted from
                // the beginning, because nobody may have looked at the attempt since
                let took = began.elapsed().min(timeout);
                *locked(&silent_until) = began + 2 * took;
            }
            let stream = connected?.into_inner();
            let Some(tls) = tls else {
                return Ok(TokioIo::new(Transport::plain(stream)));
            };
            let connected = tokio::time::timeout(handshake_timeout, tls.connect(stream)).await;
            Ok(TokioIo::new(connected??))
        })
    }
}

/// Connects once: the channel over it is one connection, and ends with it.
pub(crate) struct ConnectOnce {
    connect: Option<Connect>,
    closed: CancellationToken,
}

impl ConnectOnce {
    /// `closed` is cancelled when there is no connection any more.
    pub(crate) fn new(connect: Connect, closed: CancellationToken) -> Self {
        ConnectOnce {
            connect: Some(connect),
            closed,
        }
    }
}

impl Service<Uri> for ConnectOnce {
    type Response = TokioIo<Transport>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<TokioIo<Transport>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match &mut self.connect {
            Some(connect) => connect.poll_ready(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Some(mut connect) = self.connect.take() else {
            self.closed.cancel();
            return Box::pin(std::future::ready(Err("the connection is closed".into())));
        };
        let (connecting, closed) = (connect.call(uri), self.closed.clone());
        Box::pin(async move {
            let transport = connecting.await?.into_inner();
            Ok(TokioIo::new(transport.until_closed(closed)))
        })
    }
}

fn locked(instant: &Mutex<Instant>) -> MutexGuard<'_, Instant> {
    instant.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

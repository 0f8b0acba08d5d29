//! Connections of the servers: accepted, and where TLS is on, let in by a handshake of their own. Handshakes run side by side,
//! and each has a bound, so that a silent client holds nobody up.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::SingleCertAndKey,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tonic::transport::server::{Connected, TcpIncoming};

use crate::{
    certificates::{Files, Loaded, PemFile, Watched, provider},
    config::{ClientAuth, TlsConfig},
    error::StartError,
    peer::Peer,
    state_log::StateLog,
};

/// A peer that is gone without a word is found out by the kernel, whatever state the connection is in.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);
static ACCEPTING: StateLog = StateLog::new("connection not accepted", "connections are accepted");

/// After an accept that failed for want of a file descriptor, say: trying again at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a server shows and asks for. A whole configuration is replaced when files change: a session that the one before has
/// verified is unknown to its successor.
pub(crate) struct ServerTls {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// What is spoken inside the TLS of a port.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    Grpc,
    Http,
}

impl ServerTls {
    /// Reads the files that the settings of `service` name.
    ///
    /// # Errors
    /// A file that is missing or no good, by its name.
    pub(crate) fn load(
        service: &'static str,
        config: &TlsConfig,
    ) -> Result<Arc<Watched<ServerTls>>, StartError> {
        let (cert, key) = config.identity(service);
        let file = |setting, path| PemFile { setting, path };
        let ca = config.client_ca.as_ref().unwrap_or(&config.ca);
        let asks = config.client_auth != ClientAuth::None;
        let files = Files {
            identity: Some((file("tls.cert", cert), file("tls.key", key))),
            ca: asks.then(|| file("tls.client_ca", ca.clone())),
        };
        let client_auth = config.client_auth;
        Watched::load(service, files, move |loaded| {
            let of = |alpn| server_config(&loaded, client_auth, alpn);
            Ok(ServerTls {
                grpc: of(b"h2")?,
                http: of(b"http/1.1")?,
            })
        })
    }
}

fn server_config(
    loaded: &Loaded,
    client_auth: ClientAuth,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let wrong = |error: &dyn std::fmt::Display| rustls::Error::General(error.to_string());
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match (client_auth, &loaded.roots) {
        (ClientAuth::None, _) | (_, None) => builder.with_no_client_auth(),
        (asked, Some(roots)) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
            let verifier = match asked {
                ClientAuth::Required => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| wrong(&error))?)
        }
    };
    let identity = loaded.identity.clone();
    let identity = identity.ok_or(rustls::Error::NoCertificatesPresented)?;
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = vec![alpn.to_vec()];
    if client_auth != ClientAuth::None {
        // a resumed session carries the certificate of the first one, and nobody looks whether it has expired since
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(Arc::new(config))
}

/// The TLS of a port.
#[derive(Clone)]
pub(crate) struct Acceptor {
    pub(crate) tls: Arc<Watched<ServerTls>>,
    pub(crate) protocol: Protocol,
    /// For a handshake.
    pub(crate) bound: Duration,
}

impl Acceptor {
    async fn accept(self, stream: TcpStream) -> io::Result<Connection> {
        let tls = self.tls.current();
        let config = match self.protocol {
            Protocol::Grpc => tls.grpc.clone(),
            Protocol::Http => tls.http.clone(),
        };
        let handshake = TlsAcceptor::from(config).accept(stream);
        let stream = tokio::time::timeout(self.bound, handshake).await??;
        Ok(Connection::Tls(Box::new(stream.into())))
    }
}

/// The connections of a port, without an end. Dropped, it closes the port and breaks off handshakes.
pub(crate) struct Listener {
    sockets: TcpIncoming,
    tls: Option<Acceptor>,
    handshakes: JoinSet<io::Result<Connection>>,
}

impl Listener {
    /// In plaintext without `tls`.
    pub(crate) fn new(listener: TcpListener, tls: Option<Acceptor>) -> Listener {
        Listener {
            // answers are small and whole: waiting to fill a packet only delays them
            sockets: TcpIncoming::from(listener)
                .with_nodelay(Some(true))
                .with_keepalive(Some(TCP_KEEPALIVE)),
            tls,
            handshakes: JoinSet::new(),
        }
    }

    /// The next connection that is let in. Cancel safe.
    pub(crate) async fn next(&mut self) -> Connection {
        loop {
            let accepted = tokio::select! {
                accepted = self.sockets.next() => accepted,
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok(connection)) => return connection,
                    Ok(Err(error)) => {
                        tracing::debug!(error = %error, "TLS handshake failed");
                        continue;
                    }
                    Err(error) => {
                        tracing::error!(error = %error, "TLS handshake panicked");
                        continue;
                    }
                },
            };
            match (accepted, &self.tls) {
                (Some(Ok(stream)), None) => return Connection::Plain(stream),
                (Some(Ok(stream)), Some(tls)) => {
                    self.handshakes.spawn(tls.clone().accept(stream));
                }
                (Some(Err(error)), _) => {
                    ACCEPTING.failed(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                // a listener has no end
                (None, _) => std::future::pending().await,
            }
        }
    }

    /// As tonic takes them.
    pub(crate) fn into_stream(self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |mut listener| async move {
            Some((Ok(listener.next().await), listener))
        })
    }
}

/// A connection of either end.
pub(crate) enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    /// Who is at the other end.
    pub(crate) fn peer(&self) -> Peer {
        match self {
            Connection::Plain(_) => Peer::default(),
            Connection::Tls(stream) => {
                let (_, session) = stream.get_ref();
                Peer::of(session.peer_certificates().and_then(<[_]>::first))
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Connection::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Connection::Plain(stream) => stream.is_write_vectored(),
            Connection::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests;

//! Connections of the servers: accepted, and where TLS is on, let in by a handshake of their own. Handshakes run side by side,
//! and each has a bound, so that a silent client holds nobody up.

use std::{io, sync::Arc, time::Duration};

use futures::StreamExt as _;
use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::SingleCertAndKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::TcpIncoming;

use crate::{
    admission::{Admission, Seat},
    certificates::{Files, Loaded, PemFile, Watched, provider},
    config::{ClientAuth, Limits, TlsConfig},
    error::StartError,
    line::Line,
    listen::PREFACE,
    state_log::StateLog,
    transport::{Connection, Transport},
};

/// A peer that is gone without a word is found out by the kernel, whatever state the connection is in.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);
/// Bytes that TLS keeps for a socket that does not take them; rustls would keep 64 KiB.
const UNSENT: usize = 16 * 1024;
static ACCEPTING: StateLog = StateLog::new("connection not accepted", "connections are accepted");

/// After an accept that failed for want of a file descriptor, say: trying again at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a server shows and asks for. A whole configuration is replaced when files change: a session that the one before has
/// verified is unknown to its successor.
pub(crate) struct ServerTls {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// What is spoken on a port, inside its TLS if it has one.
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
    async fn accept(self, stream: TcpStream) -> io::Result<Transport> {
        let tls = self.tls.current();
        let config = match self.protocol {
            Protocol::Grpc => tls.grpc.clone(),
            Protocol::Http => tls.http.clone(),
        };
        let handshake = TlsAcceptor::from(config).accept_with(stream, |session| {
            session.set_buffer_limit(Some(UNSENT));
        });
        let stream = tokio::time::timeout(self.bound, handshake).await??;
        Ok(Transport::tls(stream.into()))
    }
}

/// The connections of a port, without an end. Dropped, it closes the port and breaks off handshakes.
pub(crate) struct Listener {
    sockets: TcpIncoming,
    tls: Option<Acceptor>,
    handshakes: JoinSet<io::Result<(Transport, Seat)>>,
    admission: Admission,
    limits: Limits,
    /// Bytes with which every connection of this protocol begins.
    first_word: u64,
    has_roles: bool,
}

impl Listener {
    /// In plaintext without `tls`.
    pub(crate) fn new(
        listener: TcpListener,
        tls: Option<Acceptor>,
        admission: &Admission,
        limits: &Limits,
        protocol: Protocol,
    ) -> Listener {
        Listener {
            // answers are small and whole: waiting to fill a packet only delays them
            sockets: TcpIncoming::from(listener)
                .with_nodelay(Some(true))
                .with_keepalive(Some(TCP_KEEPALIVE)),
            tls,
            handshakes: JoinSet::new(),
            admission: admission.clone(),
            limits: limits.clone(),
            first_word: match protocol {
                Protocol::Grpc => PREFACE,
                // the time for the rest of its headers is hyper's to watch
                Protocol::Http => 1,
            },
            has_roles: true,
        }
    }

    /// Its callers have no role, not even those of everybody.
    pub(crate) fn without_roles(self) -> Listener {
        Listener {
            has_roles: false,
            ..self
        }
    }

    #[cfg(test)]
    pub(crate) fn unbounded(listener: TcpListener, tls: Option<Acceptor>) -> Listener {
        let limits = Limits::default();
        let admission = Admission::new(&limits);
        Listener::new(listener, tls, &admission, &limits, Protocol::Http)
    }

    /// The next connection that is let in. Cancel safe.
    pub(crate) async fn next(&mut self) -> Connection {
        loop {
            let accepted = tokio::select! {
                accepted = self.sockets.next() => accepted,
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok((transport, seat))) => return self.seated(transport, seat),
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
            match accepted {
                Some(Ok(stream)) => {
                    let Some(seat) = self.admission.seat() else {
                        continue;
                    };
                    let Some(tls) = self.tls.clone() else {
                        return self.seated(Transport::plain(stream), seat);
                    };
                    let handshake = async move { Ok((tls.accept(stream).await?, seat)) };
                    self.handshakes.spawn(handshake);
                }
                Some(Err(error)) => {
                    ACCEPTING.failed(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                // a listener has no end
                None => std::future::pending().await,
            }
        }
    }

    fn seated(&self, transport: Transport, seat: Seat) -> Connection {
        let mut peer = transport.peer();
        if !self.has_roles {
            peer = peer.without_roles();
        }
        let name = peer.names().first().map(String::as_str);
        let line = Line::new(&self.admission, seat, name, &self.limits, self.first_word);
        Connection::new(transport, peer, line)
    }
}

#[cfg(test)]
mod tests;

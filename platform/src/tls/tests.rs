//! Who is let in by a handshake and what is known of him; handshakes that fail or never end; certificates that change.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::future::join_all;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status,
    service::Routes,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};

use super::*;
use crate::{
    listen::serve_grpc,
    peer,
    test_authority::{Authority, EXPIRED, Folder, GOOD, Signed},
};

/// Answers with NOT_FOUND and the caller's name.
struct Mirror;

#[tonic::async_trait]
impl Health for Mirror {
    type WatchStream = futures::stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::not_found(peer::caller(&request)))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("not watched here"))
    }
}

/// A server of gRPC with the certificate in its folder.
struct Served {
    authority: Authority,
    folder: Folder,
    tls: Arc<Watched<ServerTls>>,
    address: SocketAddr,
    _serving: JoinSet<()>,
}

const BOUND: Duration = Duration::from_millis(300);

async fn serve(client_auth: ClientAuth, bound: Duration) -> Served {
    let authority = Authority::new(GOOD);
    let folder = Folder::of(&authority, &authority.sign("served", GOOD));
    let config = TlsConfig {
        cert: Some(folder.path("cert.pem")),
        key: Some(folder.path("key.pem")),
        ca: folder.path("ca.pem"),
        client_auth,
        ..TlsConfig::default()
    };
    let tls = ServerTls::load("served", &config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = Acceptor {
        tls: tls.clone(),
        protocol: Protocol::Grpc,
        bound,
    };
    let listener = Listener::unbounded(listener, Some(acceptor));
    let router = Routes::new(HealthServer::new(Mirror)).into_axum_router();
    let mut serving = JoinSet::new();
    let limits = Limits::default();
    serving.spawn(serve_grpc(
        listener,
        router,
        limits,
        CancellationToken::new(),
    ));
    Served {
        authority,
        folder,
        tls,
        address,
        _serving: serving,
    }
}

impl Served {
    fn channel(&self, shown: Option<&Signed>) -> Channel {
        let ca = Certificate::from_pem(self.authority.pem());
        let mut tls = ClientTlsConfig::new().ca_certificate(ca);
        if let Some(shown) = shown {
            tls = tls.identity(Identity::from_pem(&shown.cert, &shown.key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect_lazy()
    }

    /// The name that the server knows a caller by; none: he was not let in.
    async fn known_as(&self, shown: Option<&Signed>) -> Option<String> {
        name_of(&self.channel(shown)).await
    }

    /// A connection of rustls', which can be asked how it came about.
    async fn connect(&self, config: &Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::from(self.address.ip());
        let mut stream = TlsConnector::from(config.clone())
            .connect(name, stream)
            .await?;
        // tickets come after the handshake, before the server's first words
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        stream.write_all(preface).await?;
        stream.read_u8().await?;
        Ok(stream)
    }

    fn client(
        &self,
        version: &'static SupportedProtocolVersion,
        shown: Option<&Signed>,
        alpn: &[u8],
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.authority.pem().as_bytes()).unwrap();
        roots.add(ca).unwrap();
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some(Signed { cert, key }) => {
                let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        Arc::new(config)
    }
}

async fn name_of(channel: &Channel) -> Option<String> {
    let mut client = HealthClient::new(channel.clone());
    let status = client.check(HealthCheckRequest::default()).await;
    let status = status.unwrap_err();
    (status.code() == Code::NotFound).then(|| status.message().to_owned())
}

#[tokio::test]
async fn a_call_knows_whom_the_handshake_has_verified() {
    let served = serve(ClientAuth::Optional, Duration::from_secs(30)).await;
    let desk = served.authority.sign("desk", GOOD);
    assert_eq!(served.known_as(Some(&desk)).await.unwrap(), "desk");
    assert_eq!(served.known_as(None).await.unwrap(), "unauthenticated");
    let expired = served.authority.sign("desk", EXPIRED);
    assert_eq!(served.known_as(Some(&expired)).await, None);
    let foreign = Authority::new(GOOD).sign("desk", GOOD);
    assert_eq!(served.known_as(Some(&foreign)).await, None);

    let required = serve(ClientAuth::Required, Duration::from_secs(30)).await;
    let desk = required.authority.sign("desk", GOOD);
    assert_eq!(required.known_as(Some(&desk)).await.unwrap(), "desk");
    assert_eq!(required.known_as(None).await, None);

    // a certificate that nobody has asked for is not shown
    let none = serve(ClientAuth::None, Duration::from_secs(30)).await;
    let desk = none.authority.sign("desk", GOOD);
    assert_eq!(none.known_as(Some(&desk)).await.unwrap(), "unauthenticated");
}

#[tokio::test]
async fn handshakes_that_never_end_hold_nobody_up_and_end() {
    let served = serve(ClientAuth::Optional, BOUND).await;
    let silent: Vec<_> = join_all((0..100).map(|_| TcpStream::connect(served.address))).await;
    let mut garbage = TcpStream::connect(served.address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(served.known_as(None).await.unwrap(), "unauthenticated");
    for silent in silent {
        let (mut silent, mut heard) = (silent.unwrap(), Vec::new());
        tokio::time::timeout(Duration::from_secs(30), silent.read_to_end(&mut heard))
            .await
            .expect("closed")
            .ok();
    }
    // what speaks something else is told so
    let http = served.client(&TLS13, None, b"http/1.1");
    assert!(served.connect(&http).await.is_err());
}

#[tokio::test]
async fn a_session_is_resumed_only_where_nobody_was_verified() {
    for version in [&TLS12, &TLS13] {
        for (client_auth, expected) in [
            (ClientAuth::None, HandshakeKind::Resumed),
            (ClientAuth::Optional, HandshakeKind::Full),
            (ClientAuth::Required, HandshakeKind::Full),
        ] {
            let served = serve(client_auth, Duration::from_secs(30)).await;
            let desk = served.authority.sign("desk", GOOD);
            let client = served.client(version, Some(&desk), b"h2");
            let mut kinds = Vec::new();
            for _ in 0..2 {
                let stream = served.connect(&client).await.unwrap();
                kinds.push(stream.get_ref().1.handshake_kind().unwrap());
            }
            let expected = [HandshakeKind::Full, expected];
            assert_eq!(kinds, expected, "{version:?} {client_auth:?}");
        }
    }
}

#[tokio::test]
async fn a_new_authority_knows_no_session_of_the_one_before() {
    let served = serve(ClientAuth::Optional, Duration::from_secs(30)).await;
    let desk = served.authority.sign("desk", GOOD);
    let open = served.channel(Some(&desk));
    assert_eq!(name_of(&open).await.unwrap(), "desk");
    let (client, next) = (
        served.client(&TLS13, Some(&desk), b"h2"),
        Authority::new(GOOD),
    );
    served.connect(&client).await.unwrap();

    served.folder.write("ca.pem", &next.pem());
    served.tls.look();
    assert!(served.connect(&client).await.is_err());
    let theirs = next.sign("desk", GOOD);
    assert_eq!(served.known_as(Some(&theirs)).await.unwrap(), "desk");
    // whoever is in goes on
    assert_eq!(name_of(&open).await.unwrap(), "desk");
}

#[tokio::test]
async fn certificates_change_under_load_and_no_call_fails() {
    let served = Arc::new(serve(ClientAuth::Optional, Duration::from_secs(30)).await);
    let desk = Arc::new(served.authority.sign("desk", GOOD));
    let done = tokio_util::sync::CancellationToken::new();
    let mut callers = JoinSet::new();
    for _ in 0..4 {
        let (served, desk, done) = (served.clone(), desk.clone(), done.clone());
        callers.spawn(async move {
            let mut calls = 0_usize;
            let kept = served.channel(Some(&desk));
            while !done.is_cancelled() {
                assert_eq!(name_of(&kept).await.as_deref(), Some("desk"));
                assert_eq!(served.known_as(Some(&desk)).await.as_deref(), Some("desk"));
                calls += 2;
            }
            calls
        });
    }
    for days in 11..21 {
        let next = served.authority.sign("served", (-1, days));
        served.folder.show(&next);
        served.tls.look();
        let shown = served.connect(&served.client(&TLS13, None, b"h2")).await;
        let shown = shown.unwrap();
        let shown = shown.get_ref().1.peer_certificates().unwrap()[0].clone();
        let expected = CertificateDer::from_pem_slice(next.cert.as_bytes()).unwrap();
        assert_eq!(shown, expected);
    }
    done.cancel();
    let calls: Vec<usize> = callers.join_all().await;
    assert!(calls.iter().all(|calls| *calls > 0), "{calls:?}");
}

//! Server assembly: opens the doors, serves, watches readiness, and stops in order within a bound: not ready, stop
//! accepting, finish what runs, stop the workers.

use std::{
    future::Future,
    io::ErrorKind,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use futures::future::OptionFuture;
use prost_reflect::DescriptorPool;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, pb::health_server::HealthServer};

use crate::{
    admission::Admission,
    bounds,
    certificates::Watched,
    config::{ClientAuth, Common, ErrorsConfig, Limits},
    error::StartError,
    grpc::Guard,
    http, listen, process,
    readiness::{self, Health, Readiness},
    roles::{Roles, need_certificate},
    standard::Standard,
    tasks::Tasks,
    telemetry::FLUSH_BOUND,
    tls::{Acceptor, Listener, Protocol, ServerTls},
};

/// What is behind the doors of a service.
pub struct Doors {
    /// The business services, guarded; health and reflection are added.
    pub grpc: Routes,
    /// What they are guarded by: it knows what is in progress, over HTTP too.
    pub guard: Guard,
    /// The full name of the service that health is asked for, `loms.Loms`.
    pub name: &'static str,
    /// The descriptor set that reflection serves, and that JSON is read by.
    pub descriptors: &'static [u8],
    /// The JSON routes; documentation, metrics, health and the answers to wrong calls are added.
    pub http: Router,
    /// What describes them, an OpenAPI document in JSON.
    pub openapi: &'static str,
}

/// The sockets, open and not yet served.
pub struct Server {
    grpc: TcpListener,
    /// For callers who are not moved to TLS yet.
    plaintext: Option<TcpListener>,
    http: TcpListener,
    /// For whoever shows no certificate: no RPC.
    admin: Option<TcpListener>,
    tls: Option<Arc<Watched<ServerTls>>>,
    /// Whether certificates are asked for over HTTP too.
    http_tls: bool,
    reload_every: Duration,
    limits: Limits,
    errors: ErrorsConfig,
    shutdown_delay: Duration,
    shutdown_grace: Duration,
}

impl Server {
    /// # Errors
    /// A setting that cannot be, a port in use, TLS files that are missing or no good.
    pub async fn bind(service: &'static str, common: &Common) -> Result<Server, StartError> {
        check(common)?;
        let server = Server {
            tls: match common.tls.enabled {
                true => Some(ServerTls::load(service, &common.tls)?),
                false => None,
            },
            grpc: listen("grpc.listen", common.grpc.listen)?,
            plaintext: listen_if("grpc.plaintext_listen", common.grpc.plaintext_listen)?,
            http: listen("http.listen", common.http.listen)?,
            admin: listen_if("admin.listen", common.admin_listen)?,
            http_tls: is_closed(common),
            reload_every: common.tls.reload_every,
            limits: common.limits.clone(),
            errors: common.errors,
            shutdown_delay: common.shutdown_delay,
            shutdown_grace: common.shutdown_grace,
        };
        Ok(server)
    }

    /// Where it listens, by the name of the port.
    pub fn addresses(&self) -> Vec<(&'static str, SocketAddr)> {
        let ports = [
            ("grpc", Some(&self.grpc)),
            ("plaintext", self.plaintext.as_ref()),
            ("http", Some(&self.http)),
            ("admin", self.admin.as_ref()),
        ];
        let open = ports
            .into_iter()
            .filter_map(|(name, port)| Some((name, local(port?))));
        open.collect()
    }

    pub fn grpc_addr(&self) -> SocketAddr {
        local(&self.grpc)
    }

    pub fn http_addr(&self) -> SocketAddr {
        local(&self.http)
    }

    /// Serves until `shutdown` or until a worker fails, then drains; for `shutdown_delay` before
    /// that it serves on, and only says that it will not. Returns when tracked work and workers are
    /// finished, or when `shutdown_grace` is over.
    ///
    /// # Errors
    /// A worker that failed, a door that broke, or work that was cut by the bound.
    pub async fn run(
        self,
        doors: Doors,
        readiness: Readiness,
        tasks: Tasks,
        shutdown: impl Future<Output = ()>,
    ) -> anyhow::Result<()> {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let health = Arc::new(Health::new());
        let closing = CancellationToken::new();
        let (name, guard) = (doors.name, doors.guard.clone());
        let database = readiness.database();
        readiness::watch(&tasks, readiness, health.clone(), reporter.clone(), name).await;
        if let Some(tls) = &self.tls {
            tls.watch("certificates", self.reload_every, &tasks);
        }

        // the last of it is for the traces, after everything that makes some
        let (delay, grace) = (self.shutdown_delay, self.shutdown_grace);
        let grace = grace.saturating_sub(FLUSH_BOUND);
        let doors = self.assemble(doors, health_service, health.clone(), closing.clone())?;
        let mut doors = tokio_util::task::AbortOnDropHandle::new(doors);
        let failed = tokio::select! {
            () = shutdown => None,
            () = tasks.failed() => tasks.failure(),
            ended = &mut doors => return Err(anyhow::anyhow!("a door closed unasked: {ended:?}")),
        };
        tracing::info!("stopping");
        health.stop();
        for service in ["", name] {
            reporter
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        if failed.is_none() && !delay.is_zero() {
            serve_on(delay, &guard, &tasks).await;
        }
        database.stop();
        closing.cancel();
        let drained = tokio::time::timeout(grace, async {
            tokio::select! {
                closed = &mut doors => closed?,
                // a silent connection, or one that watches health, does not hold the process up
                () = answered(&guard) => {}
            };
            tasks.drain().await;
            anyhow::Ok(())
        })
        .await;
        match (failed, drained) {
            (Some(error), _) => Err(error),
            (None, Ok(ended)) => ended,
            (None, Err(_)) => Err(anyhow::anyhow!(
                "work was cut: not finished within {grace:?} of shutdown_grace"
            )),
        }
    }

    /// Adds to what is behind the doors what every service has there, and serves it.
    fn assemble<H: tonic_health::pb::health_server::Health>(
        self,
        doors: Doors,
        health_service: HealthServer<H>,
        health: Arc<Health>,
        closing: CancellationToken,
    ) -> anyhow::Result<tokio::task::JoinHandle<()>> {
        let (guard, errors) = (doors.guard, self.errors);
        let standard = Standard::new(doors.name, &guard, &self.limits);
        let routes = standard.add_to(doors.grpc, doors.descriptors, health_service, errors)?;
        let standard = http::standard_routes(doors.openapi, health);
        let (http, admin) = match self.admin {
            Some(_) => (doors.http, standard),
            None => (doors.http.merge(standard), Router::new()),
        };
        let contract = DescriptorPool::decode(doors.descriptors)?;
        let limits = self.limits.clone();
        let router =
            |routes| http::router(routes, guard.clone(), contract.clone(), &limits, errors);
        let (http, admin) = (router(http), router(admin));
        Ok(self.serve(&guard, routes, http, admin, closing))
    }

    fn serve(
        self,
        guard: &Guard,
        routes: Router,
        http: Router,
        admin: Router,
        closing: CancellationToken,
    ) -> tokio::task::JoinHandle<()> {
        let bound = self.limits.idle_timeout;
        let acceptor = |protocol| {
            self.tls.clone().map(|tls| Acceptor {
                tls,
                protocol,
                bound,
            })
        };
        let http_tls = acceptor(Protocol::Http).filter(|_| self.http_tls);
        let (admission, limits) = (guard.admission().clone(), self.limits);
        let listen =
            |socket, tls, protocol| Listener::new(socket, tls, &admission, &limits, protocol);
        let listener = listen(self.grpc, acceptor(Protocol::Grpc), Protocol::Grpc);
        let plaintext = self.plaintext.map(|socket| {
            let listener = listen(socket, None, Protocol::Grpc).without_roles();
            let (routes, closing) = (routes.clone(), closing.clone());
            listen::serve_grpc(listener, routes, limits.clone(), closing)
        });
        let grpc = listen::serve_grpc(listener, routes, limits.clone(), closing.clone());
        let listener = listen(self.http, http_tls, Protocol::Http);
        let http = listen::serve_http(listener, http, limits.clone(), closing.clone());
        let admin = self.admin.map(|socket| {
            // its connections are not counted with the others: a probe finds its place
            let admission = Admission::new(&limits);
            let listener = Listener::new(socket, None, &admission, &limits, Protocol::Http);
            listen::serve_http(listener, admin, limits.clone(), closing.clone())
        });
        crate::tasks::spawn(async move {
            let (plaintext, admin) = (OptionFuture::from(plaintext), OptionFuture::from(admin));
            tokio::join!(grpc, plaintext, http, admin);
        })
    }
}

/// Serves on until callers have seen that it is not ready.
async fn serve_on(delay: Duration, guard: &Guard, tasks: &Tasks) {
    guard.leave();
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = process::hurried() => {}
        () = tasks.failed() => {}
    }
}

/// What would make a service that starts and answers nothing, or less safely than its file says.
fn check(common: &Common) -> Result<(), StartError> {
    let limits = &common.limits;
    bounds::waits(&[
        ("limits.request_timeout", limits.request_timeout),
        ("limits.idle_timeout", limits.idle_timeout),
        ("limits.write_timeout", limits.write_timeout),
        ("shutdown_grace", common.shutdown_grace),
        ("tls.reload_every", common.tls.reload_every),
    ])?;
    bounds::periods(&[("limits.connection_age", limits.connection_age)])?;
    if !common.shutdown_delay.is_zero() {
        bounds::waits(&[("shutdown_delay", common.shutdown_delay)])?;
    }
    bounds::counts(&[
        ("limits.in_flight", limits.in_flight as u64, 100_000),
        ("limits.memory", limits.memory as u64, u64::from(u32::MAX)),
        ("limits.connections", limits.connections as u64, 1_000_000),
        ("limits.body_bytes", limits.body_bytes as u64, 1 << 30),
        ("limits.header_bytes", limits.header_bytes.into(), 1 << 20),
    ])?;
    if common.shutdown_grace <= FLUSH_BOUND {
        return Err(StartError::new(
            format!("shutdown_grace = {:?}", common.shutdown_grace),
            "its last second is for traces and log lines: write 2s or more",
        ));
    }
    check_callers(common)
}

/// Whether a caller is let in only with a certificate: over HTTP then as over gRPC.
fn is_closed(common: &Common) -> bool {
    common.roles.as_ref().is_some_and(need_certificate)
        || common.tls.client_auth == ClientAuth::Required
}

/// Who may call: what would let nobody in, or somebody in by the other port.
fn check_callers(common: &Common) -> Result<(), StartError> {
    if !common.tls.enabled && common.tls.client_auth != ClientAuth::None {
        return Err(StartError::new(
            "tls.client_auth without tls.enabled: nobody can show a certificate",
            "set tls.enabled to true, or tls.client_auth to none",
        ));
    }
    if common.grpc.plaintext_listen.is_some() {
        if !common.tls.enabled {
            return Err(StartError::new(
                "grpc.plaintext_listen without tls.enabled: grpc.listen is plaintext already",
                "remove it, or set tls.enabled to true",
            ));
        }
        if common.tls.client_auth == ClientAuth::Required {
            return Err(StartError::new(
                "grpc.plaintext_listen with tls.client_auth: required: callers there show no certificate",
                "remove one of them",
            ));
        }
    }
    if common.roles.as_ref().is_some_and(Roles::is_empty) {
        return Err(StartError::new(
            "roles is empty: nobody could call anything",
            "name who may, or remove it",
        ));
    }
    let named = common.roles.as_ref().is_some_and(need_certificate);
    if named && common.tls.client_auth == ClientAuth::None {
        return Err(StartError::new(
            "roles without tls.client_auth: nobody is asked for a certificate",
            "set tls.client_auth to required or optional, or give \"*\" a role",
        ));
    }
    if is_closed(common) && common.admin_listen.is_none() {
        return Err(StartError::new(
            "admin.listen is missing: HTTP is closed to callers without a certificate, and probes and Prometheus show none",
            "set admin.listen to an address that only they reach, or remove tls.client_auth: required and give \"*\" a role",
        ));
    }
    Ok(())
}

fn local(listener: &TcpListener) -> SocketAddr {
    // a bound socket has an address; the unspecified one shows in a test at once
    listener
        .local_addr()
        .unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
}

fn listen_if(
    key: &'static str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, StartError> {
    address.map(|address| listen(key, address)).transpose()
}

fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    let mut bound = open(address);
    if address.ip() == Ipv6Addr::UNSPECIFIED && bound.as_ref().is_err_and(has_no_ipv6) {
        bound = open((Ipv4Addr::UNSPECIFIED, address.port()).into());
    }
    bound.map_err(|error| {
        StartError::new(
            format!("listening on {address}: {error}"),
            format!("stop what uses the port, or set {key}"),
        )
    })
}

/// Connections that wait to be accepted. The standard library's 128 are fewer than a burst of
/// callers; of more, the kernel forgets some after it has told their callers that they are there.
const BACKLOG: u32 = 4096;

fn open(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A kernel, or a container, without IPv6.
fn has_no_ipv6(error: &std::io::Error) -> bool {
    const EAFNOSUPPORT: i32 = 97;
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// Time for the last answer over gRPC to leave for its socket: where HTTP/2 and TLS keep it, nobody says when it is gone.
const FLUSH: Duration = Duration::from_millis(250);

/// Resolves when every call that was in progress has its answer, a slow reader the last byte of it.
async fn answered(guard: &Guard) {
    // a call that arrived with the signal is in progress by then
    tokio::time::sleep(FLUSH).await;
    guard.idle().await;
    tokio::time::sleep(FLUSH).await;
}

//! Server assembly: opens both doors, serves, watches readiness, and stops in order within a bound: not ready, stop
//! accepting, finish what runs, stop the workers.

use std::{fs, future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, ServerTlsConfig, server::TcpIncoming},
};
use tonic_health::{ServingStatus, pb::health_server::HealthServer};

use crate::{
    config::{ClientAuth, Common, Limits},
    error::StartError,
    grpc::Guard,
    http, listen,
    readiness::{self, Health, Readiness},
    tasks::Tasks,
    telemetry::FLUSH_BOUND,
};

/// A peer that is gone without a word is found out by the kernel, whatever state the connection is in.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// What is behind the doors of a service.
pub struct Doors {
    /// The business services, guarded; health and reflection are added.
    pub grpc: Routes,
    /// What they are guarded by: it knows what is in progress, over HTTP too.
    pub guard: Guard,
    /// The full name of the service that health is asked for, `loms.Loms`.
    pub name: &'static str,
    /// The descriptor set that reflection serves.
    pub descriptors: &'static [u8],
    /// The JSON routes; documentation, metrics, health and the answers to wrong calls are added.
    pub http: Router,
    /// What describes them, an OpenAPI document in JSON.
    pub openapi: &'static str,
}

/// Both sockets, open and not yet served.
pub struct Server {
    service: &'static str,
    grpc: TcpListener,
    http: TcpListener,
    tls: Option<ServerTlsConfig>,
    limits: Limits,
    shutdown_grace: Duration,
}

impl Server {
    /// # Errors
    /// A setting that cannot be, a port in use, TLS files that are missing or no PEM.
    pub async fn bind(service: &'static str, common: &Common) -> Result<Server, StartError> {
        check(common)?;
        let server = Server {
            service,
            tls: tls(service, common)?,
            grpc: listen("grpc.listen", common.grpc.listen).await?,
            http: listen("http.listen", common.http.listen).await?,
            limits: common.limits.clone(),
            shutdown_grace: common.shutdown_grace,
        };
        Ok(server)
    }

    pub fn grpc_addr(&self) -> SocketAddr {
        local(&self.grpc)
    }

    pub fn http_addr(&self) -> SocketAddr {
        local(&self.http)
    }

    /// Serves until `shutdown` or until a worker fails, then drains. Returns when tracked work and workers are finished,
    /// or when `shutdown_grace` is over.
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
        let (name, guard) = (doors.name, doors.guard);
        readiness::watch(&tasks, readiness, health.clone(), reporter.clone(), name).await;

        let routes = with_standard_services(doors.grpc, name, doors.descriptors, health_service)?;
        // the last of it is for the traces, after everything that makes some
        let grace = self.shutdown_grace.saturating_sub(FLUSH_BOUND);
        let http = http::router(
            doors.http,
            doors.openapi,
            health.clone(),
            guard.clone(),
            &self.limits,
        );
        let doors = self.serve(routes, http, closing.clone())?;

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
        closing.cancel();
        let drained = tokio::time::timeout(grace, async {
            let closed = tokio::select! {
                closed = &mut doors => closed?,
                // a silent connection, or one that watches health, does not hold the process up
                () = answered(&guard) => Ok(()),
            };
            tasks.drain().await;
            closed
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

    fn serve(
        self,
        routes: Routes,
        router: Router,
        closing: CancellationToken,
    ) -> anyhow::Result<tokio::task::JoinHandle<anyhow::Result<()>>> {
        let mut builder = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(self.limits.idle_timeout))
            .http2_keepalive_timeout(Some(listen::PING_BOUND))
            .http2_max_header_list_size(self.limits.header_bytes);
        if let Some(tls) = self.tls {
            builder = builder.tls_config(tls)?;
        }
        // the builder's own settings of this kind are for sockets that it has bound
        let incoming = TcpIncoming::from(self.grpc)
            .with_nodelay(Some(true))
            .with_keepalive(Some(TCP_KEEPALIVE));
        let grpc = builder
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, closing.clone().cancelled_owned());
        let http = listen::serve_http(self.http, router, self.limits, closing);
        let service = self.service;
        Ok(crate::tasks::spawn(async move {
            let (grpc, ()) = tokio::join!(grpc, http);
            grpc.map_err(|error| {
                anyhow::Error::from(error).context(format!("serving {service} over gRPC"))
            })
        }))
    }
}

/// What would make a service that starts and answers nothing, or less safely than its file says.
fn check(common: &Common) -> Result<(), StartError> {
    let (limits, postgres) = (&common.limits, &common.postgres);
    let durations = [
        ("limits.request_timeout", limits.request_timeout),
        ("limits.idle_timeout", limits.idle_timeout),
        ("postgres.acquire_timeout", postgres.acquire_timeout),
        ("postgres.lock_timeout", postgres.lock_timeout),
        ("postgres.statement_timeout", postgres.statement_timeout),
        (
            "postgres.idle_in_transaction_timeout",
            postgres.idle_in_transaction_timeout,
        ),
        ("postgres.max_lifetime", postgres.max_lifetime),
        ("postgres.reap_after", postgres.reap_after),
    ];
    for (key, duration) in durations {
        if duration.is_zero() {
            return Err(StartError::new(
                format!("{key} = 0s"),
                "every wait has a bound and time to begin: write 1ms or more",
            ));
        }
    }
    if limits.in_flight == 0 {
        return Err(StartError::new(
            "limits.in_flight = 0",
            "it would refuse every call: write 1 or more",
        ));
    }
    if common.shutdown_grace <= FLUSH_BOUND {
        return Err(StartError::new(
            format!("shutdown_grace = {:?}", common.shutdown_grace),
            "its last second is for traces and log lines: write 2s or more",
        ));
    }
    if !common.tls.enabled && common.tls.client_auth != ClientAuth::None {
        return Err(StartError::new(
            "tls.client_auth without tls.enabled: nobody can show a certificate",
            "set tls.enabled to true, or tls.client_auth to none",
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

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| {
        StartError::new(
            format!("listening on {address}: {error}"),
            format!("stop what uses the port, or set {key}"),
        )
    })
}

fn tls(service: &str, common: &Common) -> Result<Option<ServerTlsConfig>, StartError> {
    let config = &common.tls;
    if !config.enabled {
        return Ok(None);
    }
    let (cert, key) = config.identity(service);
    let identity = Identity::from_pem(pem("tls.cert", &cert)?, pem("tls.key", &key)?);
    let mut tls = ServerTlsConfig::new()
        .identity(identity)
        .timeout(common.limits.idle_timeout);
    if config.client_auth != ClientAuth::None {
        let ca = config.client_ca.as_ref().unwrap_or(&config.ca);
        tls = tls
            .client_ca_root(Certificate::from_pem(pem("tls.client_ca", ca)?))
            .client_auth_optional(config.client_auth == ClientAuth::Optional);
    }
    // tonic reads the PEM only when it serves; a wrong file has to show before that
    tonic::transport::Server::builder()
        .tls_config(tls.clone())
        .map_err(|error| {
            StartError::new(
                format!("TLS from {} and {}: {error}", cert.display(), key.display()),
                "run make certs",
            )
        })?;
    Ok(Some(tls))
}

fn pem(key: &'static str, path: &Path) -> Result<Vec<u8>, StartError> {
    fs::read(path).map_err(|error| {
        StartError::new(
            format!("reading {key} {}: {error}", path.display()),
            format!("run make certs, set {key}, or set tls.enabled to false"),
        )
    })
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

/// Adds the standard services that every service has: health and reflection.
fn with_standard_services(
    routes: Routes,
    name: &'static str,
    descriptors: &'static [u8],
    health: HealthServer<impl tonic_health::pb::health_server::Health>,
) -> anyhow::Result<Routes> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // so that tools can print the details of an error
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            // the descriptor set knows its neighbours too; this door serves only these
            .with_service_name(name)
            .with_service_name("grpc.health.v1.Health")
    };
    // v1alpha is what grpcurl before 1.8.8 and other old tools ask for
    let routes = routes
        .add_service(health)
        .add_service(
            reflection()
                .with_service_name("grpc.reflection.v1.ServerReflection")
                .build_v1()?,
        )
        .add_service(
            reflection()
                .with_service_name("grpc.reflection.v1alpha.ServerReflection")
                .build_v1alpha()?,
        );
    // these are not behind the guard: a full house must not look like a dead one
    let stamped = axum::middleware::from_fn(http::stamp_trace_id);
    Ok(Routes::from(routes.into_axum_router().layer(stamped)))
}

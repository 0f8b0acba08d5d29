//! Puts the service together: sockets, pools and clients are opened by `bind`, before anything is served.

use std::{future::Future, net::SocketAddr, pin::pin, time::Duration};

use axum::Router;
use platform::{
    client::{Client, Neighbour, UpstreamTls},
    error::StartError,
    grpc::Guard,
    http, import, migrate,
    pg::{Database, Pool},
    process,
    readiness::Readiness,
    roles::Policy,
    server::{Doors, Server},
    tasks::Tasks,
    telemetry,
};
use proto::cart::{cart_client::CartClient, cart_server::CartServer};
use sqlx::migrate::Migrator;
use tokio::net::TcpStream;
use tonic::codec::CompressionEncoding;

use crate::{
    carts::Carts,
    clients::{loms::Loms, products::Products},
    config::Config,
    grpc::CartService,
    import::ORIGINAL,
    purchases::Purchases,
    recovery::Recovery,
    roles::METHODS,
};

/// The name that ports, metrics and traces know it by.
pub const SERVICE: &str = "checkout";
/// Fewer than purchases that the worker finishes at once (`purchases.at_once`): none is held while LOMS is asked.
const WORKER_CONNECTIONS: u32 = 2;
/// How long a neighbour may take to accept the connection that the readiness report tries.
const NEIGHBOUR_BOUND: Duration = Duration::from_secs(1);

/// The schema `checkout`.
pub static MIGRATOR: Migrator = sqlx::migrate!();

/// The service, bound and not yet running.
pub struct App {
    server: Server,
    doors: Doors,
    readiness: Readiness,
    recovery: Recovery,
    tasks: Tasks,
    pools: [Pool; 2],
}

impl App {
    /// Opens both sockets, prepares pools and clients. The database and neighbours may be away.
    ///
    /// # Errors
    /// A port in use, a file that cannot be read, an address that is none.
    pub async fn bind(config: Config) -> Result<App, StartError> {
        config.check()?;
        let server = Server::bind(SERVICE, &config.common()).await?;
        let database = Database::new(SERVICE, &config.postgres, &MIGRATOR)?;
        database.expect_settled(&ORIGINAL).await?;
        let pool = database.pool(SERVICE, config.postgres.max_connections);
        // callers cannot take the connections that finishing purchases needs
        let workers = database.pool("checkout-workers", WORKER_CONNECTIONS);
        let tasks = Tasks::new();
        let loms = Loms::new(loms_client(&config, &tasks)?);
        let products = products(&config, &tasks)?;

        let carts = Carts::new(pool.clone(), loms.clone(), products, tasks.clone());
        let settings = &config.purchases;
        let purchases = |pool: &Pool| {
            Purchases::new(pool.clone(), loms.clone(), tasks.clone(), settings.clone())
        };
        let recovery = Recovery::new(workers.clone(), purchases(&workers), settings.clone());
        Ok(App {
            server,
            doors: doors(&config, CartService::new(carts, purchases(&pool))),
            readiness: readiness(&config, database, loms),
            recovery,
            tasks,
            pools: [pool, workers],
        })
    }

    /// Where it listens, by the name of the port.
    pub fn addresses(&self) -> Vec<(&'static str, SocketAddr)> {
        self.server.addresses()
    }

    /// Where gRPC listens.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.server.grpc_addr()
    }

    /// Where HTTP listens.
    pub fn http_addr(&self) -> SocketAddr {
        self.server.http_addr()
    }

    /// Serves and works until `shutdown`, then drains.
    ///
    /// # Errors
    /// A worker that failed, or work that was cut by `shutdown_grace`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let stopping = self.tasks.stopping();
        self.tasks.worker("recovery", self.recovery.run(stopping));
        let ended = self
            .server
            .run(self.doors, self.readiness, self.tasks, shutdown)
            .await;
        for pool in self.pools {
            pool.close();
        }
        ended
    }
}

/// The process: says where it listens, serves until a signal, sends its last traces.
///
/// # Errors
/// What stopped it, if it was not asked to.
pub async fn serve(config: Config, stop_on_stdin_close: bool) -> anyhow::Result<()> {
    #[cfg(feature = "failpoints")]
    let _crash_points = fail::FailScenario::setup();
    let telemetry = telemetry::init(SERVICE, &config.log, &config.jaeger, &config.graylog)?;
    let mut shutdown = pin!(process::shutdown_signal(stop_on_stdin_close)?);
    let Some(app) = process::start(shutdown.as_mut(), App::bind(config)).await? else {
        telemetry.shutdown().await;
        return Ok(());
    };
    process::announce(SERVICE, &app.addresses());
    let ended = app.run(shutdown).await;
    telemetry.shutdown().await;
    ended
}

/// Applies what is missing of the schema, on a database that has been away for at most `wait`.
///
/// # Errors
/// The database stays away, or holds what the system before left; or a migration fails.
pub async fn migrate(config: &Config, wait: Duration) -> anyhow::Result<()> {
    import::refuse_unsettled(&config.postgres, &ORIGINAL, wait).await?;
    // no released file builds an index on a table that is in use
    migrate::migrate(&config.postgres, &MIGRATOR, &[], wait).await
}

fn loms_client(config: &Config, tasks: &Tasks) -> Result<Client, StartError> {
    let tls = config.tls.enabled.then(|| UpstreamTls {
        ca: ("tls.ca", config.tls.ca.clone()),
        identity: Some(config.tls.identity(SERVICE)),
        server_name: None,
    });
    let tls = match &config.loms.tls {
        None => tls,
        Some(own) => own.enabled.then(|| UpstreamTls {
            ca: ("loms.tls.ca", own.ca.clone()),
            identity: own.cert.clone().zip(own.key.clone()),
            server_name: own.server_name.clone(),
        }),
    };
    let neighbour = Neighbour {
        name: "loms",
        address: config.services.loms.clone(),
        tls,
        reload_every: config.tls.reload_every,
        connect_timeout: config.loms.connect_timeout,
        timeout: config.loms.timeout,
    };
    Client::new(SERVICE, &neighbour, tasks)
}

fn products(config: &Config, tasks: &Tasks) -> Result<Products, StartError> {
    let neighbour = Neighbour {
        name: "products",
        address: config.services.products.clone(),
        tls: config.products.tls.then(|| UpstreamTls {
            ca: ("products.ca", config.products.ca.clone()),
            identity: None,
            server_name: None,
        }),
        reload_every: config.tls.reload_every,
        connect_timeout: config.products.connect_timeout,
        timeout: config.products.timeout,
    };
    let client = Client::new(SERVICE, &neighbour, tasks)?;
    Ok(Products::new(
        client,
        config.token.clone(),
        &config.products,
        tasks.clone(),
    ))
}

fn doors(config: &Config, service: CartService) -> Doors {
    let limits = &config.limits;
    let server = CartServer::new(service)
        .max_decoding_message_size(limits.body_bytes)
        .accept_compressed(CompressionEncoding::Gzip);
    let guard = Guard::new(SERVICE, limits, Policy::new(METHODS, config.roles.as_ref()));
    let service = guard.wrap(server);
    let client = CartClient::new(service.clone());
    Doors {
        grpc: tonic::service::Routes::new(service),
        guard,
        name: "cart.Cart",
        descriptors: proto::DESCRIPTORS,
        http: routes(client),
        openapi: proto::openapi::CHECKOUT,
    }
}

/// A JSON route for an RPC of the in-process client.
macro_rules! rpc {
    ($client:expr, $method:ident) => {{
        let client = $client.clone();
        http::rpc(move |request| {
            let mut client = client.clone();
            async move { client.$method(request).await }
        })
    }};
}

fn routes(client: CartClient<platform::grpc::Guarded<CartServer<CartService>>>) -> Router {
    Router::new()
        .route("/addToCart", rpc!(client, add_to_cart))
        .route("/deleteFromCart", rpc!(client, delete_from_cart))
        .route("/listCart", rpc!(client, list_cart))
        // what old clients call for /listCart
        .route("/listCartRequest", rpc!(client, list_cart))
        .route("/purchase", rpc!(client, purchase))
}

fn readiness(config: &Config, database: Database, loms: Loms) -> Readiness {
    let (address, products) = (
        config.services.loms.clone(),
        config.services.products.clone(),
    );
    Readiness::new(database)
        .note("loms", move || {
            let (reached, loms) = (reachable(address.clone()), loms.clone());
            async move {
                let reached = reached.await;
                if loms.ignores_keys() {
                    return format!("{reached}, it ignores idempotency keys");
                }
                reached
            }
        })
        .note("products", move || reachable(products.clone()))
}

/// Whether somebody listens there; a request would cost one of the few that ProductService allows.
async fn reachable(address: String) -> String {
    match tokio::time::timeout(NEIGHBOUR_BOUND, TcpStream::connect(&address)).await {
        Ok(Ok(_)) => "ok".to_owned(),
        Ok(Err(_)) | Err(_) => "unreachable".to_owned(),
    }
}

//! The service put together: sockets and pools first, then workers, then the doors.

use std::{net::SocketAddr, time::Duration};

use axum::Router;
use platform::{
    error::StartError,
    grpc::Guard,
    http::{rpc, rpc_with_body},
    import, migrate,
    pg::{Database, Pool},
    readiness::Readiness,
    roles::Policy,
    server::{Doors, Server},
    tasks::Tasks,
};
use proto::loms::{loms_client::LomsClient, loms_server::LomsServer};
use sqlx::migrate::Migrator;
use tonic::{codec::CompressionEncoding, service::Routes};

use crate::{
    config::Config,
    expiry,
    grpc::LomsService,
    import::ORIGINAL,
    keys,
    outbox::{self, Broker, Relay},
    payments::Payments,
    placement::Placements,
    roles::METHODS,
    sampled_audit,
    store::online::ONLINE,
};

/// The schema `loms`.
pub static MIGRATOR: Migrator = sqlx::migrate!("../migrations/loms");

pub(crate) const SERVICE: &str = "loms";
/// Bytes of an order as JSON: 10,000 lines, as many as `orders.max_lines` allows, of 100 bytes
/// each.
const ORDER_BYTES: usize = 1024 * 1024;

/// Brings the schema up to date, on a database that has been away for at most `wait`.
///
/// # Errors
/// The database stays away, or holds what the system before left; or a migration fails.
pub async fn migrate(config: &Config, wait: Duration) -> anyhow::Result<()> {
    import::refuse_unsettled(&config.postgres, &ORIGINAL, wait).await?;
    migrate::migrate(&config.postgres, &MIGRATOR, &ONLINE, wait).await
}

/// LOMS with its doors open, not yet served.
pub struct App {
    config: Config,
    server: Server,
    database: Database,
    pool: Pool,
    broker: Broker,
}

impl App {
    /// # Errors
    /// A port in use, a certificate that is missing, a setting that cannot be.
    pub async fn bind(config: Config) -> Result<App, StartError> {
        config.check()?;
        let server = Server::bind(SERVICE, &config.common()).await?;
        let database = Database::new(SERVICE, &config.postgres, &MIGRATOR)?;
        database.expect_settled(&ORIGINAL).await?;
        let pool = database.pool(SERVICE, config.postgres.max_connections);
        let broker = Broker::new(&config.brokers, &config.kafka)?;
        outbox::settle_at_start(&database, config.kafka.partitioner).await?;
        Ok(App {
            config,
            server,
            database,
            pool,
            broker,
        })
    }

    /// Where it listens, by the name of the port.
    pub fn addresses(&self) -> Vec<(&'static str, SocketAddr)> {
        self.server.addresses()
    }

    pub fn grpc_addr(&self) -> SocketAddr {
        self.server.grpc_addr()
    }

    pub fn http_addr(&self) -> SocketAddr {
        self.server.http_addr()
    }

    /// Serves until `shutdown`, then drains.
    ///
    /// # Errors
    /// A worker that failed, or work that was cut by `shutdown_grace`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let App {
            config,
            server,
            database,
            pool,
            broker,
        } = self;
        let tasks = Tasks::new();
        let (placements, payments, relay) =
            start_workers(&config, &database, &pool, &broker, &tasks)?;

        let service = LomsService {
            pool: pool.clone(),
            open_to_unauthenticated: config.admin.allow_unauthenticated,
            max_lines: config.orders.max_lines,
            keys_kept: config.keys.keep,
            placements,
            payments,
            relay,
            tasks: tasks.clone(),
        };
        let policy = Policy::new(METHODS, config.roles().as_ref());
        let guard = Guard::new(SERVICE, &config.limits, policy);
        let service = LomsServer::new(service)
            .max_decoding_message_size(config.limits.body_bytes)
            .accept_compressed(CompressionEncoding::Gzip);
        let guarded = guard.wrap(service);
        let doors = Doors {
            grpc: Routes::new(guarded.clone()),
            guard,
            name: "loms.Loms",
            descriptors: proto::DESCRIPTORS,
            http: routes(LomsClient::new(guarded)),
            openapi: proto::openapi::LOMS,
        };
        let readiness = Readiness::new(database).note("kafka", move || {
            let broker = broker.clone();
            async move { broker.state().await }
        });
        let ended = server.run(doors, readiness, tasks, shutdown).await;
        pool.close();
        ended
    }
}

/// Everything that runs beside the calls, each with a connection of its own; answers what calls need of it.
fn start_workers(
    config: &Config,
    database: &Database,
    pool: &Pool,
    broker: &Broker,
    tasks: &Tasks,
) -> Result<(Placements, Payments, Relay), StartError> {
    let relay = Relay::default();
    let orders = &config.orders;
    let placements = Placements::start(
        database.worker("loms-placer"),
        orders.clone(),
        relay.clone(),
        tasks,
    );
    let payments = Payments::start(
        database.worker("loms-payments"),
        orders,
        pool.clone(),
        relay.clone(),
        tasks,
    );
    expiry::start(
        database.worker("loms-expiry"),
        orders.expiry_batch,
        relay.clone(),
        tasks,
    );
    keys::start(database.worker("loms-keys"), config.keys.clone(), tasks);
    outbox::start(
        database.worker("loms-relay"),
        config.postgres.transaction_bound(),
        broker.clone(),
        config.outbox.clone(),
        relay.clone(),
        tasks,
    );
    sampled_audit::start(pool.clone(), config.audit.clone(), tasks);
    Ok((placements, payments, relay))
}

/// The in-process client: what comes over HTTP goes through the same layers as what comes over gRPC.
type Local = LomsClient<platform::grpc::Guarded<LomsServer<LomsService>>>;

fn routes(client: Local) -> Router {
    macro_rules! call {
        ($method:ident) => {{
            let client = client.clone();
            move |request| {
                let mut client = client.clone();
                async move { client.$method(request).await }
            }
        }};
    }
    Router::new()
        .route(
            "/createOrder",
            rpc_with_body(ORDER_BYTES, call!(create_order)),
        )
        .route("/listOrder", rpc(call!(list_order)))
        .route("/orderPayed", rpc(call!(order_payed)))
        .route("/cancelOrder", rpc(call!(cancel_order)))
        .route("/stocks", rpc(call!(stocks)))
}

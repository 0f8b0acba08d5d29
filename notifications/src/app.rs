//! Puts the service together: sockets, pools and clients are opened by `bind`, before anything is served.

use std::{future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use platform::{
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
use proto::notifications::{
    notifications_client::NotificationsClient, notifications_server::NotificationsServer,
};
use sqlx::migrate::Migrator;
use tokio::sync::Notify;
use tonic::codec::CompressionEncoding;

use crate::{
    config::Config, dead_letters::DeadLetters, delivery::Delivery, grpc::Service, import::ORIGINAL,
    inbox::Inbox, roles::METHODS, store::online::ONLINE,
};

/// The name that ports, metrics and traces know it by.
pub const SERVICE: &str = "notifications";
/// How long the broker may take to answer the readiness report.
const BROKER_BOUND: Duration = Duration::from_secs(1);

/// The schema `notifications`.
pub static MIGRATOR: Migrator = sqlx::migrate!();

/// The service, bound and not yet running.
pub struct App {
    server: Server,
    doors: Doors,
    readiness: Readiness,
    inbox: Inbox,
    delivery: Delivery,
    dead_letters: DeadLetters,
    pools: [Pool; 4],
}

impl App {
    /// Opens both sockets, prepares pools and clients. The database, Kafka and Telegram may be away.
    pub async fn bind(config: Config) -> Result<App, StartError> {
        config.check()?;
        let server = Server::bind(SERVICE, &config.common()).await?;
        let database = Database::new(SERVICE, &config.postgres, &MIGRATOR)?;
        database.expect_settled(&ORIGINAL).await?;
        let pool = database.pool(SERVICE, config.postgres.max_connections);
        // callers cannot take the connections that saving and telling need
        let saving = database.pool("notifications-inbox", 1);
        let telling = database.pool("notifications-delivery", 1);
        let moving = database.pool("notifications-dead-letters", 1);
        let saved = Arc::new(Notify::new());
        let dead_letters = DeadLetters::new(
            &config.brokers,
            &config.kafka,
            &config.dead_letters,
            config.inbox.dead_letter_timeout,
        )?;
        let inbox = Inbox::new(
            &config.brokers,
            &config.kafka,
            config.inbox.clone(),
            saving.clone(),
            dead_letters.clone(),
            saved.clone(),
        )?;
        Ok(App {
            server,
            doors: doors(&config, pool.clone()),
            readiness: readiness(&config, database, dead_letters.clone()),
            inbox,
            delivery: Delivery::new(&config, telling.clone(), saved)?,
            dead_letters,
            pools: [pool, saving, telling, moving],
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
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let tasks = Tasks::new();
        tasks.worker("inbox", self.inbox.run(tasks.stopping()));
        tasks.worker("delivery", self.delivery.run(tasks.stopping()));
        let [_, _, _, moving] = &self.pools;
        let moving = self.dead_letters.run(moving.clone(), tasks.stopping());
        tasks.worker("dead letters", moving);
        let ended = self
            .server
            .run(self.doors, self.readiness, tasks, shutdown)
            .await;
        // after work that was cut, a connection may still be out: closing would wait for it beyond the grace
        if ended.is_ok() {
            for pool in self.pools {
                pool.close();
            }
        }
        ended
    }
}

/// The process: says where it listens, serves until a signal, sends its last traces.
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
pub async fn migrate(config: &Config, wait: Duration) -> anyhow::Result<()> {
    import::refuse_unsettled(&config.postgres, &ORIGINAL, wait).await?;
    migrate::migrate(&config.postgres, &MIGRATOR, &ONLINE, wait).await
}

fn doors(config: &Config, pool: Pool) -> Doors {
    let limits = &config.limits;
    let service = NotificationsServer::new(Service { pool })
        .max_decoding_message_size(limits.body_bytes)
        .accept_compressed(CompressionEncoding::Gzip);
    let guard = Guard::new(SERVICE, limits, Policy::new(METHODS, config.roles.as_ref()));
    let service = guard.wrap(service);
    // in process: 20,000 messages are more than the 4 MiB that a client takes by default
    let client = NotificationsClient::new(service.clone()).max_decoding_message_size(usize::MAX);
    let history = http::rpc(move |request| {
        let mut client = client.clone();
        async move { client.get_history_with_period(request).await }
    });
    Doors {
        grpc: tonic::service::Routes::new(service),
        guard,
        name: "notifications.Notifications",
        descriptors: proto::DESCRIPTORS,
        http: axum::Router::new().route("/history", history),
        openapi: proto::openapi::NOTIFICATIONS,
    }
}

fn readiness(config: &Config, database: Database, dead_letters: DeadLetters) -> Readiness {
    let topics = [
        config.kafka.topic.clone(),
        config.kafka.dead_letter_topic.clone(),
    ];
    Readiness::new(database).note("kafka", move || {
        let (topics, dead_letters) = (topics.clone(), dead_letters.clone());
        async move {
            // librdkafka's question blocks
            let asked = tokio::task::spawn_blocking(move || {
                let states = topics
                    .iter()
                    .map(|topic| dead_letters.topic_state(topic, BROKER_BOUND));
                states.into_iter().find(|state| state != "ok")
            });
            asked
                .await
                .ok()
                .flatten()
                .unwrap_or_else(|| "ok".to_owned())
        }
    })
}

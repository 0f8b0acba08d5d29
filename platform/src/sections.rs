//! The sections that the services' config files share, with their defaults.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{
    config::secret,
    kafka::{Partitioner, Start},
    roles::Roles,
};

/// Where the gRPC door listens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpcConfig {
    pub listen: SocketAddr,
    /// A port in plaintext beside, while callers are moved to TLS. Whoever calls there has no role.
    #[serde(default)]
    pub plaintext_listen: Option<SocketAddr>,
}

impl GrpcConfig {
    /// At one port.
    pub fn at(listen: SocketAddr) -> GrpcConfig {
        GrpcConfig {
            listen,
            plaintext_listen: None,
        }
    }
}

/// Where the HTTP door listens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    pub listen: SocketAddr,
}

/// Where probes and Prometheus ask, who show no certificate.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminListen {
    /// Plaintext `/metrics`, `/healthz`, `/readyz` and `/docs`, which the HTTP door then has no more. Default: it has them.
    pub listen: Option<SocketAddr>,
}

/// TLS of the gRPC door and of calls to neighbours; of the HTTP door where certificates are required or roles are given. Paths
/// are relative to the working directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// `false` gives plaintext.
    pub enabled: bool,
    /// Verifies neighbours.
    pub ca: PathBuf,
    /// Default: `certs/<service>.pem`.
    pub cert: Option<PathBuf>,
    /// Default: `certs/<service>-key.pem`.
    pub key: Option<PathBuf>,
    /// Verifies clients that show a certificate. Default: `ca`.
    pub client_ca: Option<PathBuf>,
    pub client_auth: ClientAuth,
    /// How often the files are looked at: what has replaced them is shown to the next connection. Whoever renews
    /// certificates does so days before they expire.
    #[serde(with = "humantime_serde")]
    pub reload_every: Duration,
}

/// Whether clients show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// None is asked for.
    #[default]
    None,
    /// One that is shown is verified; calls of administrators need one.
    Optional,
    /// A client without one is not let in.
    Required,
}

impl TlsConfig {
    /// The certificate and the key of `service`.
    pub fn identity(&self, service: &str) -> (PathBuf, PathBuf) {
        let or = |path: &Option<PathBuf>, file: String| path.clone().unwrap_or_else(|| file.into());
        (
            or(&self.cert, format!("certs/{service}.pem")),
            or(&self.key, format!("certs/{service}-key.pem")),
        )
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        TlsConfig {
            enabled: true,
            ca: "certs/ca.pem".into(),
            cert: None,
            key: None,
            client_ca: None,
            client_auth: ClientAuth::None,
            reload_every: Duration::from_secs(10),
        }
    }
}

/// The service's PostgreSQL. Every bound of time is set on the connection, so that no statement waits without one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// `postgres://user:password@host:port/database`
    #[serde(deserialize_with = "secret")]
    pub connection_string: SecretString,
    /// Connections for callers; workers have their own few besides.
    #[serde(default = "defaults::max_connections")]
    pub max_connections: u32,
    /// A caller waits this long for a connection, then gets RESOURCE_EXHAUSTED, or UNAVAILABLE if there is no server.
    #[serde(default = "defaults::one_second", with = "humantime_serde")]
    pub acquire_timeout: Duration,
    #[serde(default = "defaults::two_seconds", with = "humantime_serde")]
    pub lock_timeout: Duration,
    #[serde(default = "defaults::three_seconds", with = "humantime_serde")]
    pub statement_timeout: Duration,
    #[serde(default = "defaults::five_seconds", with = "humantime_serde")]
    pub idle_in_transaction_timeout: Duration,
    /// Prepared statements kept per connection; with 0 none is kept, and statements have no names.
    #[serde(default = "defaults::statement_cache")]
    pub statement_cache: usize,
    /// What stands between this service and its server.
    #[serde(default)]
    pub pooler: Pooler,
    /// A connection is replaced after this time, so that what changed on the way to the server is noticed.
    #[serde(default = "defaults::half_an_hour", with = "humantime_serde")]
    pub max_lifetime: Duration,
    /// How long the answer to a statement is waited for that its caller has given up. Its connection counts until then.
    #[serde(default = "defaults::thirty_seconds", with = "humantime_serde")]
    pub reap_after: Duration,
}

/// What stands between a service and PostgreSQL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooler {
    /// Nothing, or a pooler that gives a client its server for as long as it is connected (session mode).
    #[default]
    Session,
    /// One that gives it for a transaction only: nothing is set on the session, statements have no names.
    Transaction,
}

impl PostgresConfig {
    /// The longest that a transaction may take as the client sees it: a statement that runs into its time-out, and a
    /// second for the others. With the defaults that is within `limits.request_timeout`, so that a caller hears
    /// UNAVAILABLE and not that time ran out.
    pub fn transaction_bound(&self) -> Duration {
        self.statement_timeout + Duration::from_secs(1)
    }
}

/// A port, which may be written as text.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a port")]
    enum Written {
        Number(u16),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(port) => Ok(port),
        Written::Text(text) => {
            let wrong = |_| D::Error::custom(format!("expected a port, found {text:?}"));
            text.parse().map_err(wrong)
        }
    }
}

/// Jaeger's agent (UDP). An empty host: no export, trace ids all the same.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JaegerConfig {
    pub host: String,
    #[serde(deserialize_with = "port")]
    pub port: u16,
    /// Of traces that begin here, how many are sent: 0 to 1. A trace that came with a call is sent if its caller sends it.
    pub sample_ratio: f64,
}

impl Default for JaegerConfig {
    fn default() -> Self {
        JaegerConfig {
            host: String::new(),
            port: 6831,
            sample_ratio: 1.0,
        }
    }
}

/// Graylog's GELF input (TCP). An empty host: the log goes to stdout only.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GraylogConfig {
    pub host: String,
    #[serde(deserialize_with = "port")]
    pub port: u16,
}

impl Default for GraylogConfig {
    fn default() -> Self {
        GraylogConfig {
            host: String::new(),
            port: 12201,
        }
    }
}

/// The log on stdout.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, or by target: `info,loms::placement=debug`.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            level: "info".into(),
        }
    }
}

/// What one process takes on at once.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The longest that a call may take, whatever its caller allows.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Calls that are worked on, from their whole message to the answer made; one more is
    /// RESOURCE_EXHAUSTED at once.
    pub in_flight: usize,
    /// Bytes of requests that arrive and of answers that leave, all together; more is
    /// RESOURCE_EXHAUSTED at once.
    pub memory: usize,
    /// Connections over both ports; of more, some are told so and the rest are closed.
    pub connections: usize,
    /// Bytes of a gRPC message, and of an HTTP body where its route allows that many.
    pub body_bytes: usize,
    /// Bytes of the headers of one call.
    pub header_bytes: u32,
    /// An HTTP/1 connection that is silent for so long is closed, and so is one that has not finished its TLS handshake; an
    /// HTTP/2 one is asked whether somebody is there.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// An answer of which its reader takes nothing for so long is thrown away.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// A stream of health or reflection is ended after this time: they have no deadline.
    #[serde(with = "humantime_serde")]
    pub connection_age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            request_timeout: Duration::from_secs(5),
            in_flight: 512,
            memory: 64 * 1024 * 1024,
            connections: 2_000,
            body_bytes: 4 * 1024 * 1024,
            header_bytes: 16 * 1024,
            idle_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(10),
            connection_age: Duration::from_secs(60 * 60),
        }
    }
}

/// Names and times on the Kafka side.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaConfig {
    pub topic: String,
    pub dead_letter_topic: String,
    pub group: String,
    /// How long a consumer may be silent before its partitions go to others.
    #[serde(with = "humantime_serde")]
    pub session_timeout: Duration,
    /// Where a consumer begins in a partition that it has never read.
    pub start: Start,
    /// How a producer chooses the partition of an order.
    pub partitioner: Partitioner,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        KafkaConfig {
            topic: "orders".into(),
            dead_letter_topic: "orders.dlq".into(),
            group: "notifications".into(),
            session_timeout: Duration::from_secs(45),
            start: Start::default(),
            partitioner: Partitioner::default(),
        }
    }
}

/// `errors`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ErrorsConfig {
    /// Whether refusals have details of `google.rpc`. A grpc-gateway that does not know these
    /// messages answers 500 to every refusal that has some.
    pub details: bool,
}

impl Default for ErrorsConfig {
    fn default() -> Self {
        ErrorsConfig { details: true }
    }
}

/// What server assembly needs of a service's config.
#[derive(Clone, Debug)]
pub struct Common {
    pub grpc: GrpcConfig,
    pub http: HttpConfig,
    pub tls: TlsConfig,
    pub admin_listen: Option<SocketAddr>,
    pub roles: Option<Roles>,
    pub postgres: PostgresConfig,
    pub limits: Limits,
    pub errors: ErrorsConfig,
    pub shutdown_delay: Duration,
    pub shutdown_grace: Duration,
}

/// Defaults that several sections share; `shutdown_grace` is for the services' own structs.
pub mod defaults {
    use std::time::Duration;

    /// Ten seconds: the pause that orchestrators give by default is thirty.
    pub fn shutdown_grace() -> Duration {
        Duration::from_secs(10)
    }
    pub(super) fn max_connections() -> u32 {
        10
    }
    pub(super) fn statement_cache() -> usize {
        100
    }
    pub(super) fn one_second() -> Duration {
        Duration::from_secs(1)
    }
    pub(super) fn two_seconds() -> Duration {
        Duration::from_secs(2)
    }
    pub(super) fn three_seconds() -> Duration {
        Duration::from_secs(3)
    }
    pub(super) fn five_seconds() -> Duration {
        Duration::from_secs(5)
    }
    pub(super) fn thirty_seconds() -> Duration {
        Duration::from_secs(30)
    }
    pub(super) fn half_an_hour() -> Duration {
        Duration::from_secs(30 * 60)
    }
}

//! The service's configuration; `config.example.yaml` shows every key.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use platform::config::{
    Common, GrpcConfig, HttpConfig, JaegerConfig, KafkaConfig, Limits, LogConfig, PostgresConfig,
    TlsConfig, defaults,
};
use serde::Deserialize;

/// What `config.yaml` may say.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default = "grpc")]
    pub grpc: GrpcConfig,
    #[serde(default = "http")]
    pub http: HttpConfig,
    #[serde(default)]
    pub tls: TlsConfig,
    pub postgres: PostgresConfig,
    /// `host:port` of some of the brokers.
    pub brokers: Vec<String>,
    #[serde(default)]
    pub kafka: KafkaConfig,
    #[serde(default)]
    pub orders: OrdersConfig,
    #[serde(default)]
    pub outbox: OutboxConfig,
    #[serde(default)]
    pub jaeger: JaegerConfig,
    #[serde(default)]
    pub log: LogConfig,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default = "defaults::shutdown_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
}

/// How orders are placed and when they expire.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OrdersConfig {
    /// How long an order may await payment.
    #[serde(with = "humantime_serde")]
    pub payment_timeout: Duration,
    /// Orders that may wait for the placer; one more is RESOURCE_EXHAUSTED.
    pub queue: usize,
    /// Orders placed by one transaction: more gain little and hold the locks longer.
    pub batch_orders: usize,
    /// Lines placed by one transaction: real orders have up to several hundred.
    pub batch_lines: usize,
    /// Orders that one sweep cancels; their rows stay locked until it commits.
    pub expiry_batch: i64,
}

impl Default for OrdersConfig {
    fn default() -> Self {
        OrdersConfig {
            payment_timeout: Duration::from_secs(600),
            queue: 1024,
            batch_orders: 64,
            batch_lines: 5_000,
            expiry_batch: 200,
        }
    }
}

/// How events leave.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboxConfig {
    /// Events sent by one transaction of the relay.
    pub batch: i64,
    /// How long the relay waits for the broker before it gives the batch up and tries again.
    #[serde(with = "humantime_serde")]
    pub broker_timeout: Duration,
    /// How often it looks when nothing wakes it: events of another replica wait this long at most.
    #[serde(with = "humantime_serde")]
    pub poll_interval: Duration,
}

impl Default for OutboxConfig {
    fn default() -> Self {
        OutboxConfig {
            batch: 1_000,
            broker_timeout: Duration::from_secs(10),
            poll_interval: Duration::from_millis(500),
        }
    }
}

fn grpc() -> GrpcConfig {
    GrpcConfig {
        listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 50052)),
    }
}

fn http() -> HttpConfig {
    HttpConfig {
        listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8081)),
    }
}

impl Config {
    pub(crate) fn common(&self) -> Common {
        Common {
            grpc: self.grpc.clone(),
            http: self.http.clone(),
            tls: self.tls.clone(),
            postgres: self.postgres.clone(),
            limits: self.limits.clone(),
            shutdown_grace: self.shutdown_grace,
        }
    }
}

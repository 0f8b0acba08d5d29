//! The service's configuration; `config.example.yaml` shows every key.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use platform::config::{
    Common, ErrorsConfig, GraylogConfig, GrpcConfig, HttpConfig, JaegerConfig, KafkaConfig, Limits,
    LogConfig, PostgresConfig, TlsConfig, defaults,
};
use platform::{
    bounds,
    error::StartError,
    roles::{self, EVERYBODY, Role, Roles},
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
    pub keys: KeysConfig,
    #[serde(default)]
    pub outbox: OutboxConfig,
    #[serde(default)]
    pub audit: AuditConfig,
    #[serde(default)]
    pub admin: AdminConfig,
    /// Who may do what, by the names in certificates.
    #[serde(default, deserialize_with = "roles::given")]
    pub roles: Option<Roles>,
    #[serde(default)]
    pub jaeger: JaegerConfig,
    #[serde(default)]
    pub graylog: GraylogConfig,
    #[serde(default)]
    pub log: LogConfig,
    #[serde(default)]
    pub limits: Limits,
    /// What refusals say to programs.
    #[serde(default)]
    pub errors: ErrorsConfig,
    /// Between the signal to stop and the end of new calls: time for callers and balancers to see
    /// that it is not ready.
    #[serde(default, with = "humantime_serde")]
    pub shutdown_delay: Duration,
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
    /// Lines that an order may have, equal SKUs not yet summed: each costs time before anything is decided.
    pub max_lines: usize,
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
            max_lines: 10_000,
            batch_orders: 64,
            batch_lines: 5_000,
            expiry_batch: 200,
        }
    }
}

/// How long idempotency keys are kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeysConfig {
    /// How long a key gives the same order again: the contract's seven days.
    #[serde(with = "humantime_serde")]
    pub keep: Duration,
    /// How often old keys are swept: they are kept for days, so a minute is soon.
    #[serde(with = "humantime_serde")]
    pub sweep_every: Duration,
    /// Keys that one sweep deletes: milliseconds of work, and whoever claims one of them waits for it.
    pub sweep_batch: i64,
}

impl Default for KeysConfig {
    fn default() -> Self {
        KeysConfig {
            keep: Duration::from_secs(7 * 24 * 60 * 60),
            sweep_every: Duration::from_secs(60),
            sweep_batch: 1_000,
        }
    }
}

/// How events leave.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboxConfig {
    /// Events that the relay reads and sends at once.
    pub batch: i64,
    /// How long the relay waits for the broker before it gives the batch up and tries again. Its lease is longer by the
    /// time that reading and the last reports may take, and at least 10 s: so long nobody sends for a relay that died.
    #[serde(with = "humantime_serde")]
    pub broker_timeout: Duration,
    /// How often it looks when nothing wakes it: events of a replica that has not the lease wait this long at most.
    #[serde(with = "humantime_serde")]
    pub poll_interval: Duration,
}

/// More makes no batch arrive: whatever waits so long is tried again.
const MOST_BROKER_TIMEOUT: Duration = Duration::from_secs(600);

impl Default for OutboxConfig {
    fn default() -> Self {
        OutboxConfig {
            batch: 1_000,
            broker_timeout: Duration::from_secs(10),
            poll_interval: Duration::from_millis(500),
        }
    }
}

/// The audit that runs beside the orders, over a sample.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// How often; 0 turns it off.
    #[serde(with = "humantime_serde")]
    pub every: Duration,
    /// SKUs, and as many orders, of one sample: some milliseconds of work.
    pub sample: usize,
}

impl Default for AuditConfig {
    fn default() -> Self {
        AuditConfig {
            every: Duration::from_secs(300),
            sample: 20,
        }
    }
}

/// What is for those who run the service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// Where probes and Prometheus ask in plaintext; see [`platform::config::AdminListen`].
    pub listen: Option<SocketAddr>,
    /// ReceiveStock without a client certificate too (see `tls.client_auth`), where something else keeps strangers out.
    /// With roles it counts only where [`EVERYBODY`] has some.
    pub allow_unauthenticated: bool,
}

fn grpc() -> GrpcConfig {
    GrpcConfig::at(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 50052)))
}

fn http() -> HttpConfig {
    HttpConfig {
        listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8081)),
    }
}

impl Config {
    /// What would start and then do nothing.
    ///
    /// # Errors
    /// The first key that cannot be as it is.
    pub(crate) fn check(&self) -> Result<(), StartError> {
        let (orders, keys, outbox) = (&self.orders, &self.keys, &self.outbox);
        bounds::waits(&[
            ("outbox.broker_timeout", outbox.broker_timeout),
            ("outbox.poll_interval", outbox.poll_interval),
        ])?;
        bounds::periods(&[
            ("orders.payment_timeout", orders.payment_timeout),
            ("keys.keep", keys.keep),
            ("keys.sweep_every", keys.sweep_every),
        ])?;
        let count = |number: i64| u64::try_from(number).unwrap_or_default();
        bounds::counts(&[
            ("orders.max_lines", orders.max_lines as u64, 1_000_000),
            ("orders.queue", orders.queue as u64, 1_000_000),
            ("orders.batch_orders", orders.batch_orders as u64, 10_000),
            ("orders.expiry_batch", count(orders.expiry_batch), 1_000_000),
            ("keys.sweep_batch", count(keys.sweep_batch), 1_000_000),
            ("outbox.batch", count(outbox.batch), 1_000_000),
        ])?;
        if self.outbox.broker_timeout > MOST_BROKER_TIMEOUT {
            return Err(StartError::new(
                format!("outbox.broker_timeout is over {MOST_BROKER_TIMEOUT:?}"),
                "the lease of a relay that died holds events back for longer than that: write less",
            ));
        }
        Ok(())
    }

    /// The callers' roles; `admin.allow_unauthenticated` makes operators of everybody.
    pub(crate) fn roles(&self) -> Option<Roles> {
        let mut roles = self.roles.clone();
        if self.admin.allow_unauthenticated
            && let Some(everybody) = roles.as_mut().and_then(|roles| roles.get_mut(EVERYBODY))
        {
            everybody.push(Role::Operator);
        }
        roles
    }

    pub(crate) fn common(&self) -> Common {
        Common {
            grpc: self.grpc.clone(),
            http: self.http.clone(),
            tls: self.tls.clone(),
            admin_listen: self.admin.listen,
            roles: self.roles(),
            postgres: self.postgres.clone(),
            limits: self.limits.clone(),
            errors: self.errors,
            shutdown_delay: self.shutdown_delay,
            shutdown_grace: self.shutdown_grace,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fmt::Debug, path::Path};

    use serde_json::{Value, json};

    use super::*;

    fn config(section: &str, value: Value) -> Config {
        let mut config =
            json!({"postgres": {"connection_string": "postgres://h/d"}, "brokers": []});
        config[section] = value;
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn roles_with_nothing_under_them_name_nobody() {
        assert!(config("orders", json!({})).roles.is_none());
        assert_eq!(config("roles", Value::Null).roles, Some(Roles::new()));
    }

    #[test]
    fn what_is_beyond_its_bounds_is_refused() {
        assert!(config("orders", json!({})).check().is_ok());
        for (section, change) in [
            ("orders", json!({"payment_timeout": "8000years"})),
            ("orders", json!({"expiry_batch": -1})),
            ("outbox", json!({"poll_interval": "100us"})),
            ("keys", json!({"keep": "0s"})),
        ] {
            assert!(config(section, change.clone()).check().is_err(), "{change}");
        }
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let example: Config =
            platform::config::load(Some(Path::new("config.example.yaml"))).unwrap();
        let shown = |value: &dyn Debug| format!("{value:?}");
        assert_eq!(shown(&example.orders), shown(&OrdersConfig::default()));
        assert_eq!(shown(&example.keys), shown(&KeysConfig::default()));
        assert_eq!(shown(&example.audit), shown(&AuditConfig::default()));
        assert_eq!(shown(&example.outbox), shown(&OutboxConfig::default()));
        assert_eq!(shown(&example.kafka), shown(&KafkaConfig::default()));
        assert_eq!(shown(&example.limits), shown(&Limits::default()));
        // whoever copies it opens no plaintext door to the network
        assert!(example.http.listen.ip().is_loopback());
        assert_eq!(example.shutdown_grace, defaults::shutdown_grace());
    }
}

//! What an operator can set, each with its default and the reason for it. `config.example.yaml` lists every key.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use platform::{
    bounds,
    config::{
        AdminListen, Common, ErrorsConfig, GraylogConfig, GrpcConfig, HttpConfig, JaegerConfig,
        KafkaConfig, Limits, LogConfig, PostgresConfig, TlsConfig, defaults, secret, text,
    },
    error::StartError,
    roles::{self, Roles},
};
use secrecy::SecretString;
use serde::Deserialize;

/// `config.yaml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The contract's port, 50053.
    #[serde(default = "grpc")]
    pub grpc: GrpcConfig,
    /// The contract's port, 8082.
    #[serde(default = "http")]
    pub http: HttpConfig,
    /// Of the gRPC door.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Where probes and Prometheus ask.
    #[serde(default)]
    pub admin: AdminListen,
    /// Who may do what, by the names in certificates.
    #[serde(default, deserialize_with = "roles::given")]
    pub roles: Option<Roles>,
    /// The database of messages.
    pub postgres: PostgresConfig,
    /// Kafka's addresses, `host:port`.
    pub brokers: Vec<String>,
    /// Topics and group.
    #[serde(default)]
    pub kafka: KafkaConfig,
    /// How events are taken in.
    #[serde(default)]
    pub inbox: InboxConfig,
    /// How what cannot be saved is kept.
    #[serde(default)]
    pub dead_letters: DeadLettersConfig,
    /// Whom to tell; empty: the log.
    #[serde(default)]
    pub telegram: TelegramConfig,
    /// How messages are told.
    #[serde(default)]
    pub delivery: DeliveryConfig,
    /// Traces.
    #[serde(default)]
    pub jaeger: JaegerConfig,
    #[serde(default)]
    pub graylog: GraylogConfig,
    /// Logs.
    #[serde(default)]
    pub log: LogConfig,
    /// What one process takes on at once.
    #[serde(default)]
    pub limits: Limits,
    /// What refusals say to programs.
    #[serde(default)]
    pub errors: ErrorsConfig,
    /// Between the signal to stop and the end of new calls: time for callers and balancers to see
    /// that it is not ready.
    #[serde(default, with = "humantime_serde")]
    pub shutdown_delay: Duration,
    /// How long stopping may take.
    #[serde(default = "defaults::shutdown_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
}

/// How events are taken in.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InboxConfig {
    /// Events saved by one transaction at most: 500 cost about as much as the flush of the log that ends them.
    pub batch: usize,
    /// After a failure the same batch is tried again so soon; doubled each time, with jitter.
    #[serde(with = "humantime_serde")]
    pub backoff: Duration,
    /// The longest wait: how long a database that is back goes unnoticed.
    #[serde(with = "humantime_serde")]
    pub longest_backoff: Duration,
    /// How long the broker may take to acknowledge a dead letter before it is tried again.
    #[serde(with = "humantime_serde")]
    pub dead_letter_timeout: Duration,
}

impl Default for InboxConfig {
    fn default() -> Self {
        InboxConfig {
            batch: 500,
            backoff: Duration::from_millis(100),
            longest_backoff: Duration::from_secs(5),
            dead_letter_timeout: Duration::from_secs(5),
        }
    }
}

/// How what cannot be saved is kept until the dead-letter topic has it, and a while longer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeadLettersConfig {
    /// How long the worker that moves them sleeps; a letter kept by this process wakes it at once.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// How long a row is kept after the topic has its letter: a week to notice that the topic lost
    /// it.
    #[serde(with = "humantime_serde")]
    pub keep: Duration,
    /// Letters that may wait to be moved; one more pauses its partition. With ten thousands of them
    /// it is no longer single events that are wrong.
    pub max_rows: i64,
    /// Their bytes: the table must not fill the disk that the messages need.
    pub max_bytes: i64,
}

impl Default for DeadLettersConfig {
    fn default() -> Self {
        DeadLettersConfig {
            poll: Duration::from_secs(5),
            keep: Duration::from_secs(7 * 24 * 60 * 60),
            max_rows: 100_000,
            max_bytes: 1024 * 1024 * 1024,
        }
    }
}

/// Whom to tell. Without a key or a chat, messages go to the log.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelegramConfig {
    /// The bot's key, as its maker was told it.
    #[serde(deserialize_with = "secret")]
    pub api_key: SecretString,
    /// The chat, a number or `@name`.
    #[serde(deserialize_with = "text")]
    pub chat_id: String,
    /// The Bot API; a self-hosted gateway or a test stands here too.
    pub api_url: String,
    /// One attempt: an answer that takes longer is seldom one.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Default for TelegramConfig {
    fn default() -> Self {
        TelegramConfig {
            api_key: SecretString::default(),
            chat_id: String::new(),
            api_url: "https://api.telegram.org".to_owned(),
            timeout: Duration::from_secs(5),
        }
    }
}

/// How messages are told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeliveryConfig {
    /// Messages on their way at once; also how many may be told twice after a crash.
    pub in_flight: u32,
    /// How long an idle sender sleeps; a message saved by this process wakes it at once.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// The wait after a message's first failure; doubled each time, with jitter.
    #[serde(with = "humantime_serde")]
    pub backoff: Duration,
    /// The longest wait. With the two above, twelve attempts take about 50 minutes: an outage of that length loses nothing.
    #[serde(with = "humantime_serde")]
    pub longest_backoff: Duration,
    /// A message that failed so often is given up.
    pub max_attempts: u32,
    /// So is one that was saved so long ago: news about an order is worth little an hour later.
    #[serde(with = "humantime_serde")]
    pub give_up_after: Duration,
    /// The right to send lapses so long after its holder was last heard of; more than `telegram.timeout`.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
}

impl Default for DeliveryConfig {
    fn default() -> Self {
        DeliveryConfig {
            in_flight: 4,
            poll: Duration::from_secs(1),
            backoff: Duration::from_secs(5),
            longest_backoff: Duration::from_secs(600),
            max_attempts: 12,
            give_up_after: Duration::from_secs(3600),
            lease: Duration::from_secs(20),
        }
    }
}

impl Config {
    /// # Errors
    /// The first setting that cannot be as it is.
    pub(crate) fn check(&self) -> Result<(), StartError> {
        let (inbox, delivery) = (&self.inbox, &self.delivery);
        let dead_letters = &self.dead_letters;
        bounds::waits(&[
            ("kafka.session_timeout", self.kafka.session_timeout),
            ("inbox.backoff", inbox.backoff),
            ("inbox.longest_backoff", inbox.longest_backoff),
            ("inbox.dead_letter_timeout", inbox.dead_letter_timeout),
            ("dead_letters.poll", dead_letters.poll),
            ("telegram.timeout", self.telegram.timeout),
            ("delivery.poll", delivery.poll),
            ("delivery.backoff", delivery.backoff),
            ("delivery.longest_backoff", delivery.longest_backoff),
            ("delivery.lease", delivery.lease),
        ])?;
        bounds::periods(&[
            ("delivery.give_up_after", delivery.give_up_after),
            ("dead_letters.keep", dead_letters.keep),
        ])?;
        bounds::counts(&[
            ("inbox.batch", inbox.batch as u64, 100_000),
            (
                "dead_letters.max_rows",
                u64::try_from(dead_letters.max_rows).unwrap_or_default(),
                10_000_000,
            ),
            (
                "dead_letters.max_bytes",
                u64::try_from(dead_letters.max_bytes).unwrap_or_default(),
                1 << 40,
            ),
            ("delivery.in_flight", delivery.in_flight.into(), 10_000),
            (
                "delivery.max_attempts",
                delivery.max_attempts.into(),
                1_000_000,
            ),
        ])
    }

    /// What server assembly needs.
    pub fn common(&self) -> Common {
        Common {
            grpc: self.grpc.clone(),
            http: self.http.clone(),
            tls: self.tls.clone(),
            admin_listen: self.admin.listen,
            roles: self.roles.clone(),
            postgres: self.postgres.clone(),
            limits: self.limits.clone(),
            errors: self.errors,
            shutdown_delay: self.shutdown_delay,
            shutdown_grace: self.shutdown_grace,
        }
    }
}

fn grpc() -> GrpcConfig {
    GrpcConfig::at(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 50053)))
}

fn http() -> HttpConfig {
    HttpConfig {
        listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8082)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_example_lists_every_key_with_its_default() {
        let example = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.yaml"));
        let example: Config = platform::config::load(Some(example)).expect("a config");
        let smallest =
            serde_json::json!({"brokers": [], "postgres": {"connection_string": "postgres://x"}});
        let smallest: Config = serde_json::from_value(smallest).expect("a config");
        let sections = |config: &Config| {
            format!(
                "{:?}",
                (
                    &config.grpc,
                    &config.http.listen.port(),
                    &config.kafka,
                    &config.inbox,
                    &config.dead_letters,
                    &config.delivery
                )
            ) + &format!(
                "{:?}",
                (
                    &config.telegram,
                    &config.jaeger,
                    &config.log,
                    &config.limits
                )
            ) + &format!(
                "{:?}",
                (config.shutdown_grace, config.postgres.max_connections)
            )
        };
        assert_eq!(sections(&example), sections(&smallest));
        // whoever copies it opens no plaintext door to the network
        assert!(example.http.listen.ip().is_loopback());
    }
}

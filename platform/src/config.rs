//! Configuration: YAML, then `${NAME}` and `${NAME:-default}` in scalars from the environment, then the typed sections
//! that every service shares. The only place that reads the environment.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, de::DeserializeOwned, de::Error as _};
use serde_yaml::Value;

use crate::error::StartError;

/// Reads `file`, or `./config.yaml`. The YAML is parsed first, so that a secret cannot break its syntax; a scalar that
/// held a `${..}` is then typed again, so that a port or a switch may come from the environment.
pub fn load<T: DeserializeOwned>(file: Option<&Path>) -> Result<T, StartError> {
    let path = file.unwrap_or(Path::new("config.yaml"));
    let text = fs::read_to_string(path).map_err(|error| {
        StartError::new(
            format!("reading the config {}: {error}", path.display()),
            "name an existing file with --config, or copy config.example.yaml to config.yaml",
        )
    })?;
    parse(&text, &|name| std::env::var(name).ok()).map_err(|error| {
        StartError::new(
            format!("config {}: {error}", path.display()),
            "correct it; config.example.yaml lists every key",
        )
    })
}

fn parse<T: DeserializeOwned>(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<T, String> {
    let mut value: Value = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    if value.is_null() {
        value = Value::Mapping(serde_yaml::Mapping::default());
    }
    substitute(&mut value, lookup)?;
    // names the key that is wrong, which a deserializer of values does not
    serde_path_to_error::deserialize(value).map_err(|error| error.to_string())
}

fn substitute(value: &mut Value, lookup: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    match value {
        Value::String(text) if text.contains('$') => {
            let (expanded, substituted) = expand(text, lookup)?;
            *value = if substituted {
                retype(expanded)
            } else {
                Value::String(expanded)
            };
        }
        Value::Sequence(items) => {
            for item in items {
                substitute(item, lookup)?;
            }
        }
        Value::Mapping(entries) => {
            for (_, item) in entries.iter_mut() {
                substitute(item, lookup)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A number or a switch again, if its canonical form is the very text: `007` is a password, not a seven.
fn retype(text: String) -> Value {
    if let Ok(flag) = text.parse::<bool>() {
        return Value::Bool(flag);
    }
    match text.parse::<i64>() {
        Ok(number) if number.to_string() == text => Value::Number(number.into()),
        _ => Value::String(text),
    }
}

fn expand(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<(String, bool), String> {
    let (mut out, mut rest, mut substituted) = (String::with_capacity(text.len()), text, false);
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some(end) = after.find('}') else {
                return Err("a ${ without its }".into());
            };
            let (name, default) = match after[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&after[..end], None),
            };
            // as in a shell, `:-` also replaces an empty value
            let found = lookup(name).filter(|found| default.is_none() || !found.is_empty());
            let Some(found) = found.or_else(|| default.map(str::to_owned)) else {
                return Err(format!(
                    "the environment has no {name} and ${{{name}}} has no default"
                ));
            };
            out.push_str(&found);
            substituted = true;
            rest = &after[end + 1..];
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok((out, substituted))
}

/// For text that may look like a number (`serde(deserialize_with)`): a chat id, a token.
pub fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        Value::Null => Ok(String::new()),
        _ => Err(D::Error::custom("expected text")),
    }
}

/// [`text`] that is never printed.
pub fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    text(deserializer).map(SecretString::from)
}

/// Where the gRPC door listens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpcConfig {
    pub listen: SocketAddr,
}

/// Where the HTTP door listens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    pub listen: SocketAddr,
}

/// TLS of the gRPC door and of calls to neighbours. Paths are relative to the working directory.
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
}

impl Default for TlsConfig {
    fn default() -> Self {
        TlsConfig {
            enabled: true,
            ca: "certs/ca.pem".into(),
            cert: None,
            key: None,
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
    /// A caller waits this long for a connection, then gets UNAVAILABLE.
    #[serde(default = "defaults::one_second", with = "humantime_serde")]
    pub acquire_timeout: Duration,
    #[serde(default = "defaults::two_seconds", with = "humantime_serde")]
    pub lock_timeout: Duration,
    #[serde(default = "defaults::five_seconds", with = "humantime_serde")]
    pub statement_timeout: Duration,
    #[serde(default = "defaults::five_seconds", with = "humantime_serde")]
    pub idle_in_transaction_timeout: Duration,
    /// Prepared statements kept per connection; 0 for a transaction pooler that does not carry them.
    #[serde(default = "defaults::statement_cache")]
    pub statement_cache: usize,
}

impl PostgresConfig {
    /// The longest that a worker's transaction may take as the client sees it: a statement that runs into its time-out,
    /// and as much again for the others.
    pub fn transaction_bound(&self) -> Duration {
        self.statement_timeout * 2
    }
}

/// Jaeger's agent (UDP). An empty host: no export, trace ids all the same.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JaegerConfig {
    pub host: String,
    pub port: u16,
}

impl Default for JaegerConfig {
    fn default() -> Self {
        JaegerConfig {
            host: String::new(),
            port: 6831,
        }
    }
}

/// The log on stdout.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, or the directives of tracing's `EnvFilter`.
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
    /// Calls in progress; one more is RESOURCE_EXHAUSTED at once.
    pub in_flight: usize,
    /// Bytes of an HTTP body or a gRPC message.
    pub body_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            request_timeout: Duration::from_secs(5),
            in_flight: 512,
            body_bytes: 4 * 1024 * 1024,
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
}

impl Default for KafkaConfig {
    fn default() -> Self {
        KafkaConfig {
            topic: "orders".into(),
            dead_letter_topic: "orders.dlq".into(),
            group: "notifications".into(),
            session_timeout: Duration::from_secs(45),
        }
    }
}

/// What server assembly needs of a service's config.
#[derive(Clone, Debug)]
pub struct Common {
    pub grpc: GrpcConfig,
    pub http: HttpConfig,
    pub tls: TlsConfig,
    pub postgres: PostgresConfig,
    pub limits: Limits,
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
    pub(super) fn five_seconds() -> Duration {
        Duration::from_secs(5)
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[serde(default)]
        port: u16,
        #[serde(default)]
        name: String,
        #[serde(default)]
        tls: TlsConfig,
        #[serde(deserialize_with = "secret", default)]
        key: SecretString,
    }

    fn sample(text: &str) -> Result<Sample, String> {
        parse(text, &|name| match name {
            "PORT" => Some("50052".into()),
            "OFF" => Some("false".into()),
            "EMPTY" => Some(String::new()),
            "DIGITS" => Some("007".into()),
            "YAML" => Some("a: {b".into()),
            _ => None,
        })
    }

    #[test]
    fn scalars_from_the_environment_are_typed_again() {
        let config = sample("port: ${PORT}\ntls: {enabled: \"${OFF}\"}\nkey: ${DIGITS}").unwrap();
        assert_eq!(config.port, 50052);
        assert!(!config.tls.enabled);
        assert_eq!(config.key.expose_secret(), "007");
        assert_eq!(sample("key: ${PORT}").unwrap().key.expose_secret(), "50052");
    }

    #[test]
    fn defaults_dollars_and_yaml_in_a_value() {
        let name = |text: &str| sample(text).unwrap().name;
        assert_eq!(name("name: x${NONE:-y}z"), "xyz");
        assert_eq!(name("name: ${EMPTY:-y}"), "y");
        assert_eq!(name("name: a$$b$c"), "a$b$c");
        assert_eq!(name("name: \"${YAML}\""), "a: {b");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(sample("name: ${NONE}").unwrap_err().contains("NONE"));
        assert!(sample("nmae: x").unwrap_err().contains("nmae"));
        assert!(sample("name: ${NONE").unwrap_err().contains("${"));
        assert!(sample("port: eighty").unwrap_err().contains("port"));
    }
}

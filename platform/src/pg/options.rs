//! What a connection string comes to, checked as far as it can be without a server.

use std::{fmt::Display, str::FromStr as _, time::Duration};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use secrecy::ExposeSecret as _;
use sqlx::{ConnectOptions as _, postgres::PgConnectOptions};

use crate::{bounds, config::PostgresConfig, error::StartError};

const WRITTEN: &str = "write it as postgres://user:password@host:port/database";

/// Without start-up parameters of ours: a pooler refuses those that it does not know.
pub(super) fn connect_options(config: &PostgresConfig) -> Result<PgConnectOptions, StartError> {
    bounds::waits(&[
        ("postgres.acquire_timeout", config.acquire_timeout),
        ("postgres.lock_timeout", config.lock_timeout),
        ("postgres.statement_timeout", config.statement_timeout),
        (
            "postgres.idle_in_transaction_timeout",
            config.idle_in_transaction_timeout,
        ),
        ("postgres.max_lifetime", config.max_lifetime),
        ("postgres.reap_after", config.reap_after),
    ])?;
    let most = 10_000;
    bounds::counts(&[(
        "postgres.max_connections",
        config.max_connections.into(),
        most,
    )])?;
    let text = config.connection_string.expose_secret();
    if !["postgres://", "postgresql://"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
    {
        return Err(StartError::new(
            "postgres.connection_string is not of PostgreSQL",
            WRITTEN,
        ));
    }
    let options = PgConnectOptions::from_str(text).map_err(|error| {
        // the error, not the string: it holds a password
        StartError::new(format!("postgres.connection_string: {error}"), WRITTEN)
    })?;
    for file in files_of(text) {
        let wrong = |what: &dyn Display| {
            StartError::new(
                format!("postgres.connection_string: reading {file}: {what}"),
                "name a PEM file that can be read",
            )
        };
        let content = std::fs::read(&file).map_err(|error| wrong(&error))?;
        let mut certificates = CertificateDer::pem_slice_iter(&content);
        let is_certificate = certificates.next().is_some_and(|first| first.is_ok());
        if !is_certificate && PrivateKeyDer::from_pem_slice(&content).is_err() {
            return Err(wrong(&"it has neither a certificate nor a key"));
        }
    }
    Ok(options
        .statement_cache_capacity(config.statement_cache)
        .extra_float_digits(None)
        .log_statements(tracing::log::LevelFilter::Off)
        // a busy disk makes every statement slow: a line for each would be a storm, latency is a
        // metric
        .log_slow_statements(tracing::log::LevelFilter::Debug, Duration::from_secs(1)))
}

/// The certificates and keys that a connection string names.
fn files_of(connection_string: &str) -> Vec<String> {
    let parameters = connection_string
        .split_once('?')
        .map_or("", |(_, rest)| rest);
    let file = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let inline = value.starts_with("-----BEGIN");
        (matches!(
            name,
            "sslrootcert"
                | "ssl-root-cert"
                | "ssl-ca"
                | "sslcert"
                | "ssl-cert"
                | "sslkey"
                | "ssl-key"
        ) && !inline)
            .then(|| value.replace("%2F", "/").replace("%2f", "/"))
    };
    parameters.split('&').filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_connection_string_are_looked_for_at_the_start() {
        let config = |text: &str| -> PostgresConfig {
            serde_json::from_value(serde_json::json!({"connection_string": text})).unwrap()
        };
        let missing = "postgres://u:secret@h/d?sslmode=verify-full&sslrootcert=%2Fno%2Fsuch.pem";
        let error = connect_options(&config(missing)).unwrap_err().to_string();
        assert!(error.contains("/no/such.pem"), "{error}");
        assert!(!error.contains("secret"), "{error}");
        assert!(connect_options(&config("postgres://u:secret@h/d?sslmode=require")).is_ok());
        let wrong = connect_options(&config("secret@h"))
            .unwrap_err()
            .to_string();
        assert!(!wrong.contains("secret"), "{wrong}");
    }
}

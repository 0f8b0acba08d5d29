//! What a connection string comes to, checked as far as it can be without a server.

use std::{borrow::Cow, fmt::Display, str::FromStr as _, time::Duration};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use secrecy::ExposeSecret as _;
use sqlx::{ConnectOptions as _, postgres::PgConnectOptions};

use crate::{bounds, config::PostgresConfig, error::StartError};

const WRITTEN: &str =
    "write it as postgres://user:password@host:port/database, or as host=.. user=.. dbname=..";

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
    let text = url(config.connection_string.expose_secret()).ok_or_else(|| {
        StartError::new("postgres.connection_string is not of PostgreSQL", WRITTEN)
    })?;
    let options = PgConnectOptions::from_str(&text).map_err(|error| {
        // the error, not the string: it holds a password
        StartError::new(format!("postgres.connection_string: {error}"), WRITTEN)
    })?;
    for file in files_of(&text) {
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

/// Keywords that are read.
const READ: [&str; 12] = [
    "host",
    "hostaddr",
    "port",
    "user",
    "password",
    "dbname",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "application_name",
    "options",
];
/// Keywords of other drivers about what is set elsewhere here, or does not matter.
const IGNORED: [&str; 9] = [
    "connect_timeout",
    "target_session_attrs",
    "sslsni",
    "keepalives",
    "fallback_application_name",
    "client_encoding",
    "TimeZone",
    "timezone",
    "pool_max_conns",
];

/// A connection string as a URL: pairs of keyword and value (libpq, "Keyword/Value Connection
/// Strings") become its parameters. `None`: it is neither.
fn url(text: &str) -> Option<Cow<'_, str>> {
    let schemes = ["postgres://", "postgresql://"];
    if schemes.iter().any(|scheme| text.starts_with(scheme)) {
        return Some(text.into());
    }
    let url = "postgres:///?";
    let mut parameters = form_urlencoded::Serializer::for_suffix(url.to_owned(), url.len());
    for (keyword, value) in pairs(text)? {
        match keyword {
            _ if IGNORED.contains(&keyword) => {}
            _ if READ.contains(&keyword) => {
                parameters.append_pair(keyword, &value);
            }
            // a password under another name would be logged by what does not know it
            _ => return None,
        }
    }
    Some(parameters.finish().into())
}

/// Values are quoted where they are empty or have blanks; a backslash takes the next character as
/// it is.
fn pairs(text: &str) -> Option<Vec<(&str, String)>> {
    let (mut pairs, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        let (keyword, after) = rest.split_once('=')?;
        let keyword = keyword.trim_end();
        let is_keyword = |char: char| char.is_ascii_alphanumeric() || char == '_';
        if keyword.is_empty() || !keyword.chars().all(is_keyword) {
            return None;
        }
        let after = after.trim_start();
        let quoted = after.strip_prefix('\'');
        let mut chars = quoted.unwrap_or(after).char_indices();
        let mut value = String::new();
        let end = loop {
            match (chars.next(), quoted) {
                (Some((_, '\\')), _) => value.push(chars.next()?.1),
                (Some((at, '\'')), Some(_)) => break at + 1,
                (None, Some(_)) => return None,
                (Some((at, char)), None) if char.is_whitespace() => break at,
                (Some((_, char)), _) => value.push(char),
                (None, None) => break after.len(),
            }
        };
        rest = quoted.unwrap_or(after)[end..].trim_start();
        pairs.push((keyword, value));
    }
    (!pairs.is_empty()).then_some(pairs)
}

/// The certificates and keys that a connection string names.
fn files_of(connection_string: &str) -> Vec<String> {
    let parameters = connection_string
        .split_once('?')
        .map_or("", |(_, rest)| rest);
    let is_file = |name: &str| {
        matches!(
            name,
            "sslrootcert"
                | "ssl-root-cert"
                | "ssl-ca"
                | "sslcert"
                | "ssl-cert"
                | "sslkey"
                | "ssl-key"
        )
    };
    form_urlencoded::parse(parameters.as_bytes())
        .filter(|(name, value)| is_file(name) && !value.starts_with("-----BEGIN"))
        .map(|(_, value)| value.into_owned())
        .collect()
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
        let pairs = "host=h user=u password=secret sslmode=verify-full sslrootcert=/no/such.pem";
        let error = connect_options(&config(pairs)).unwrap_err().to_string();
        assert!(error.contains("/no/such.pem"), "{error}");
        assert!(!error.contains("secret"), "{error}");
        let wrong = connect_options(&config("secret@h"))
            .unwrap_err()
            .to_string();
        assert!(!wrong.contains("secret"), "{wrong}");
    }

    #[test]
    fn pairs_of_keyword_and_value_say_the_same_as_a_url() {
        let text = r"host = db.example port=6432  user=shop password='a b\'c&d=e' dbname=orders sslmode=disable";
        let of = |text: &str| PgConnectOptions::from_str(&url(text).unwrap()).unwrap();
        let (options, url) = (of(text), of(url(text).unwrap().as_ref()));
        for options in [options, url] {
            assert_eq!(options.get_host(), "db.example");
            assert_eq!(options.get_port(), 6432);
            assert_eq!(options.get_username(), "shop");
            assert_eq!(options.get_database(), Some("orders"));
            let mode = sqlx::postgres::PgSslMode::Disable;
            assert!(
                std::mem::discriminant(&options.get_ssl_mode()) == std::mem::discriminant(&mode)
            );
        }
        let found = pairs(r"user=a\ b password='' host='x'").unwrap();
        let values: Vec<_> = found.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values, ["a b", "", "x"]);
        for wrong in [
            "", "host", "host=a b", "host='a", "=a", "ho-st=a", r"host=a\",
        ] {
            assert!(pairs(wrong).is_none(), "{wrong}");
        }
        assert!(super::url("host=h pasword=secret").is_none());
        assert!(super::url("host=h connect_timeout=5").is_some_and(|url| !url.contains("time")));
        let text = pairs(text).unwrap();
        assert!(
            text.iter().any(|(_, value)| value == "a b'c&d=e"),
            "{text:?}"
        );
    }
}

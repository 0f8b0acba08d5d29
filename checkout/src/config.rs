//! The service's config: what `config.example.yaml` shows, each key with its default and the reason for it.

use std::{
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use platform::{
    bounds,
    config::{
        AdminListen, Common, ErrorsConfig, GraylogConfig, GrpcConfig, HttpConfig, JaegerConfig,
        Limits, LogConfig, PostgresConfig, TlsConfig, defaults, secret,
    },
    error::StartError,
    roles::{self, Roles},
};
use secrecy::SecretString;
use serde::Deserialize;

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The gRPC door; default `[::]:50051`.
    #[serde(default = "grpc_door")]
    pub grpc: GrpcConfig,
    /// The HTTP door; default `[::]:8090`.
    #[serde(default = "http_door")]
    pub http: HttpConfig,
    /// Of the gRPC door, and of the calls to LOMS.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Where probes and Prometheus ask.
    #[serde(default)]
    pub admin: AdminListen,
    /// Who may do what, by the names in certificates.
    #[serde(default, deserialize_with = "roles::given")]
    pub roles: Option<Roles>,
    /// The database of the schema `checkout`.
    pub postgres: PostgresConfig,
    /// Where spans go.
    #[serde(default)]
    pub jaeger: JaegerConfig,
    #[serde(default)]
    pub graylog: GraylogConfig,
    /// The log.
    #[serde(default)]
    pub log: LogConfig,
    /// Bounds of the doors.
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
    /// What ProductService knows this shop by; sent with each request.
    #[serde(deserialize_with = "secret")]
    pub token: SecretString,
    /// Where the neighbours are, `host:port`.
    pub services: Services,
    /// Calls to LOMS.
    #[serde(default)]
    pub loms: LomsConfig,
    /// Calls to ProductService.
    #[serde(default)]
    pub products: ProductsConfig,
    /// Finishing purchases.
    #[serde(default)]
    pub purchases: PurchasesConfig,
}

/// Addresses of the neighbours.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Services {
    /// LOMS.
    pub loms: String,
    /// ProductService.
    pub products: String,
}

/// Calls to LOMS.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LomsConfig {
    /// A neighbour in the same network connects at once or not at all.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// The longest that one call may take: under `limits.request_timeout`, so that a LOMS that hangs is told from a
    /// caller in a hurry.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// TLS of these calls; without it they are as the gRPC door is, with its files.
    pub tls: Option<LomsTls>,
}

/// TLS towards LOMS, when it is another than that of the gRPC door: while callers are moved to TLS.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LomsTls {
    /// `false`: plaintext.
    pub enabled: bool,
    /// The CA that its certificate is verified with.
    pub ca: PathBuf,
    /// Shown to a LOMS that asks for a certificate; both or none.
    pub cert: Option<PathBuf>,
    /// The key of `cert`.
    pub key: Option<PathBuf>,
    /// The name that its certificate is for; default the host of `services.loms`.
    pub server_name: Option<String>,
}

impl Default for LomsTls {
    fn default() -> Self {
        Self {
            enabled: true,
            ca: "certs/ca.pem".into(),
            cert: None,
            key: None,
            server_name: None,
        }
    }
}

impl Default for LomsConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(4),
            tls: None,
        }
    }
}

/// Calls to ProductService, an outside party with limits of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProductsConfig {
    /// Whether it is called over TLS.
    pub tls: bool,
    /// The CA that its certificate is verified with.
    pub ca: PathBuf,
    /// How long a name and a price are believed. A cart of 500 lines takes 50 s to price, so what was asked for its first
    /// line has to last for several tries; 0 turns the cache off.
    #[serde(with = "humantime_serde")]
    pub cache_ttl: Duration,
    /// Products kept at most; a few hundred bytes each.
    pub cache_entries: u64,
    /// An outside party may be further away than a neighbour.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// The longest that one request may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// The longest that finding out about one product may take once its first request is sent, tries included: nobody
    /// waits longer than `limits.request_timeout`, the rest is for the cache.
    #[serde(with = "humantime_serde")]
    pub lookup_timeout: Duration,
    /// What ProductService allows in any second.
    pub per_second: usize,
    /// What ProductService allows at once.
    pub at_once: usize,
    /// How much later than it was sent a request may arrive there, at most, over a connection that works. It is added to
    /// the second, because ProductService counts arrivals; 75 ms cost 7 % of the allowance while it answers slower than
    /// that, and nothing while it answers sooner.
    #[serde(with = "humantime_serde")]
    pub arrival_margin: Duration,
}

impl Default for ProductsConfig {
    fn default() -> Self {
        Self {
            tls: false,
            ca: "certs/ca.pem".into(),
            cache_ttl: Duration::from_secs(300),
            cache_entries: 100_000,
            connect_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(3),
            lookup_timeout: Duration::from_secs(10),
            per_second: 10,
            at_once: 5,
            arrival_margin: Duration::from_millis(75),
        }
    }
}

/// Finishing what a purchase left open.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PurchasesConfig {
    /// How long whoever drives a purchase is left alone: longer than a call may take.
    #[serde(with = "humantime_serde")]
    pub resume_after: Duration,
    /// The wait after the first failed attempt; it doubles.
    #[serde(with = "humantime_serde")]
    pub first_backoff: Duration,
    /// The longest wait between attempts, so that purchases come back soon after LOMS does.
    #[serde(with = "humantime_serde")]
    pub most_backoff: Duration,
    /// From this age on a purchase is resolved instead of resumed: nobody waits for an order after five minutes, and an
    /// order that appears later would surprise.
    #[serde(with = "humantime_serde")]
    pub resolve_after: Duration,
    /// How long a closed purchase answers for its key; as long as LOMS keeps keys.
    #[serde(with = "humantime_serde")]
    pub keep: Duration,
    /// How often closed purchases are swept: they are kept for days, so a minute is soon.
    #[serde(with = "humantime_serde")]
    pub sweep_every: Duration,
    /// How often the worker looks for what is due.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// Open purchases driven at once: an outage's backlog must not crowd out LOMS's callers.
    pub at_once: u8,
}

impl Default for PurchasesConfig {
    fn default() -> Self {
        Self {
            resume_after: Duration::from_secs(10),
            first_backoff: Duration::from_millis(500),
            most_backoff: Duration::from_secs(15),
            resolve_after: Duration::from_secs(5 * 60),
            keep: Duration::from_secs(7 * 24 * 60 * 60),
            sweep_every: Duration::from_secs(60),
            poll: Duration::from_millis(500),
            at_once: 4,
        }
    }
}

impl Config {
    /// # Errors
    /// The first setting that cannot be as it is.
    pub(crate) fn check(&self) -> Result<(), StartError> {
        let (loms, products, purchases) = (&self.loms, &self.products, &self.purchases);
        let tls = loms.tls.as_ref();
        if tls.is_some_and(|tls| tls.cert.is_some() != tls.key.is_some()) {
            return Err(StartError::new(
                "loms.tls has a certificate without its key, or a key without its certificate",
                "set loms.tls.cert and loms.tls.key, or none of them",
            ));
        }
        bounds::waits(&[
            ("loms.connect_timeout", loms.connect_timeout),
            ("loms.timeout", loms.timeout),
            ("products.connect_timeout", products.connect_timeout),
            ("products.timeout", products.timeout),
            ("products.lookup_timeout", products.lookup_timeout),
            ("purchases.resume_after", purchases.resume_after),
            ("purchases.first_backoff", purchases.first_backoff),
            ("purchases.most_backoff", purchases.most_backoff),
            ("purchases.poll", purchases.poll),
        ])?;
        bounds::periods(&[
            ("purchases.resolve_after", purchases.resolve_after),
            ("purchases.keep", purchases.keep),
            ("purchases.sweep_every", purchases.sweep_every),
        ])?;
        bounds::counts(&[
            ("products.per_second", products.per_second as u64, 1_000_000),
            ("products.at_once", products.at_once as u64, 100_000),
            ("purchases.at_once", purchases.at_once.into(), 1_000),
        ])
    }

    /// What server assembly needs of it.
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

fn grpc_door() -> GrpcConfig {
    GrpcConfig::at(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 50051)))
}

fn http_door() -> HttpConfig {
    HttpConfig {
        listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8090)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_example_shows_the_defaults() {
        let example: Config =
            platform::config::load(Some(Path::new("config.example.yaml"))).unwrap();
        let shown = |value: &dyn std::fmt::Debug| format!("{value:?}");
        assert_eq!(shown(&example.loms), shown(&LomsConfig::default()));
        assert_eq!(shown(&example.products), shown(&ProductsConfig::default()));
        assert_eq!(
            shown(&example.purchases),
            shown(&PurchasesConfig::default())
        );
        assert_eq!(shown(&example.limits), shown(&Limits::default()));
        assert_eq!(shown(&example.grpc), shown(&grpc_door()));
        // whoever copies it opens no plaintext door to the network
        assert!(example.http.listen.ip().is_loopback());
        assert_eq!(example.http.listen.port(), http_door().listen.port());
        assert_eq!(example.shutdown_grace, defaults::shutdown_grace());
    }
}

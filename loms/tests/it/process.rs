//! LOMS as a process, with every setting at its default.

use std::{ops::Deref, process::Output};

use proto::loms::loms_client::LomsClient;
use serde_json::{Value, json};
use sqlx::PgPool;
pub(crate) use testkit::process::File;
use tonic::transport::Channel;

use crate::kafka;

pub(crate) const LOMS: &str = env!("CARGO_BIN_EXE_loms");

/// A config for the database behind `pool` that says what it must and nothing else; JSON is YAML.
pub(crate) fn config(pool: &PgPool, topic: &str, changes: &Value) -> File {
    let mut config = json!({
        "grpc": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0"},
        "tls": {"enabled": false},
        "postgres": {"connection_string": testkit::url(pool)},
        "brokers": [kafka::brokers()],
        "kafka": {"topic": topic},
        "log": {"level": "warn"},
    });
    for (section, keys) in changes.as_object().expect("sections") {
        config[section] = keys.clone();
    }
    File::new(&config.to_string())
}

/// Runs a command of the service to its end.
pub(crate) async fn run(config: &File, arguments: &[&str]) -> Output {
    testkit::process::run(LOMS, config, arguments).await
}

/// A service that runs; dropped, it is killed.
pub(crate) struct Process(testkit::Process);

impl Deref for Process {
    type Target = testkit::Process;

    fn deref(&self) -> &testkit::Process {
        &self.0
    }
}

impl std::ops::DerefMut for Process {
    fn deref_mut(&mut self) -> &mut testkit::Process {
        &mut self.0
    }
}

impl Process {
    /// One that has 100 units of SKU 7 on sale, on a topic of its own, with these settings of
    /// `postgres`.
    pub(crate) async fn with_stock(pool: &PgPool, mut postgres: Value) -> (Process, File) {
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let topic = kafka::unused_topic();
        kafka::create_topic(&topic).await;
        if postgres["connection_string"].is_null() {
            postgres["connection_string"] = testkit::url(pool).into();
        }
        let changes = json!({"postgres": postgres, "limits": {"request_timeout": "30s"}});
        let config = config(pool, &topic, &changes);
        let stock = File::new("warehouse_id,sku,count\n1,7,100\n");
        let received = run(&config, &["stock", "receive", stock.path()]).await;
        assert!(received.status.success(), "{received:?}");
        (Process::start(&config).await, config)
    }

    pub(crate) async fn start(config: &File) -> Process {
        Process::start_with(config, "").await
    }

    /// `crash_points` as the crate `fail` reads them; without the feature `failpoints` nothing
    /// does.
    pub(crate) async fn start_with(config: &File, crash_points: &str) -> Process {
        Process(testkit::Process::start(LOMS, config, crash_points).await)
    }

    /// A line of its own; it is made by the first call.
    pub(crate) fn client(&self) -> LomsClient<Channel> {
        let endpoint = Channel::from_shared(format!("http://{}", self.grpc()));
        LomsClient::new(endpoint.expect("an address").connect_lazy())
    }

    /// Calls of its clients that wait for a connection to the database.
    pub(crate) async fn waiting(&self) -> u64 {
        let waiting = self.metric("loms_pool_waiting{pool=\"loms\"}").await;
        waiting.expect("a gauge") as u64
    }

    /// Waits until it has stopped itself, all of it, at a point that says so.
    #[cfg(feature = "failpoints")]
    pub(crate) async fn frozen(&self) {
        let status = format!("/proc/{}/stat", self.pid());
        crate::test_app::eventually("a frozen process", async || {
            let status = std::fs::read_to_string(&status).expect("it runs");
            let (_, after_name) = status.rsplit_once(") ").expect("a name in parentheses");
            after_name.starts_with('T')
        })
        .await;
    }

    /// Stops it as whatever started it does: its stdin is closed.
    pub(crate) async fn stop(self) -> std::process::ExitStatus {
        self.0.stop().await
    }
}

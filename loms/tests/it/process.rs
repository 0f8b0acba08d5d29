//! The service as a process, with every setting at its default: what only a process can show is that it can be killed.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use proto::loms::loms_client::LomsClient;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    task::JoinSet,
};
use tonic::transport::Channel;

use crate::kafka;

pub(crate) const LOMS: &str = env!("CARGO_BIN_EXE_loms");

/// A file that is gone when the test is over.
pub(crate) struct File(PathBuf);

impl File {
    pub(crate) fn new(text: &str) -> File {
        let path = std::env::temp_dir().join(format!("loms-{}", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).expect("a file");
        File(path)
    }

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
}

impl File {
    pub(crate) fn path(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

/// Runs a command of the service to its end.
pub(crate) async fn run(config: &File, arguments: &[&str]) -> Output {
    let mut command = Command::new(LOMS);
    command.args(arguments).arg("--config").arg(&config.0);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    ended.expect("an end").expect("it starts")
}

/// A service that runs; dropped, it is killed.
pub(crate) struct Process {
    child: Child,
    /// Kept apart: waiting for a child closes the one that it has.
    stdin: ChildStdin,
    grpc: SocketAddr,
    http: SocketAddr,
    /// What it logs belongs to the output of the test.
    _log: JoinSet<()>,
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
        let config = File::config(pool, &topic, &changes);
        let stock = File::new("warehouse_id,sku,count\n1,7,100\n");
        let received = run(&config, &["stock", "receive", stock.path()]).await;
        assert!(received.status.success(), "{received:?}");
        (Process::start(&config).await, config)
    }

    pub(crate) async fn start(config: &File) -> Process {
        Process::start_with(config, "").await
    }

    /// `crash_points` as the crate `fail` reads them; without the feature `failpoints` nobody does.
    pub(crate) async fn start_with(config: &File, crash_points: &str) -> Process {
        let mut child = Command::new(LOMS)
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(&config.0)
            .env("FAILPOINTS", crash_points)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let announced = async {
            loop {
                let line = lines.next_line().await.expect("text");
                let line = line.expect("it says where it listens");
                println!("{line}");
                let said: Value = serde_json::from_str(&line).expect("JSON");
                if let (Some(grpc), Some(http)) = (said["grpc"].as_str(), said["http"].as_str()) {
                    return [grpc, http].map(|address| address.parse().expect("an address"));
                }
            }
        };
        let announced = tokio::time::timeout(Duration::from_secs(60), announced).await;
        let mut log = JoinSet::new();
        log.spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                println!("{line}");
            }
        });
        let [grpc, http] = announced.expect("a start");
        Process {
            grpc,
            http,
            stdin: child.stdin.take().expect("stdin"),
            child,
            _log: log,
        }
    }

    /// A line of its own; it is made by the first call.
    pub(crate) fn client(&self) -> LomsClient<Channel> {
        let endpoint = Channel::from_shared(format!("http://{}", self.grpc)).expect("an address");
        LomsClient::new(endpoint.connect_lazy())
    }

    pub(crate) fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    pub(crate) fn http(&self) -> SocketAddr {
        self.http
    }

    /// Calls of its clients that wait for a connection to the database. The gauge belongs to the
    /// process: of the services that tests start in theirs, it would count all.
    pub(crate) async fn waiting(&self) -> u64 {
        let metrics = reqwest::get(format!("http://{}/metrics", self.http)).await;
        let metrics = metrics.expect("metrics").text().await.expect("text");
        let waiting = "loms_pool_waiting{pool=\"loms\"} ";
        let waiting = metrics.lines().find_map(|line| line.strip_prefix(waiting));
        waiting.expect("a gauge").parse().expect("a number")
    }

    /// The most memory that it has had, in KiB.
    pub(crate) fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("it runs");
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let most = most.and_then(|most| most.trim().strip_suffix(" kB"));
        most.expect("VmHWM").parse().expect("a number")
    }

    /// `kill -9`.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    /// Sends it a signal, as `kill` names it.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        let sent = std::process::Command::new("kill")
            .args([signal, &pid])
            .status();
        assert!(sent.expect("kill").success());
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

    fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Waits until it ends by itself: at a crash point, or because it was told to.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        ended(&mut self.child).await
    }

    /// Stops it as whoever started it does: its stdin is closed.
    pub(crate) async fn stop(self) -> ExitStatus {
        let Process {
            mut child, stdin, ..
        } = self;
        drop(stdin);
        ended(&mut child).await
    }
}

async fn ended(child: &mut Child) -> ExitStatus {
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
    ended.expect("an end").expect("it ran")
}

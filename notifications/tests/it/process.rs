//! The process: commands, the line that says where it listens, exit codes.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use serde_json::Value;
use sqlx::{ConnectOptions as _, PgPool};

use crate::kafka::Kafka;

fn notifications() -> Command {
    Command::new(env!("CARGO_BIN_EXE_notifications"))
}

fn config_file(text: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("notifications-{}.yaml", uuid::Uuid::new_v4()));
    std::fs::write(&path, text).expect("written");
    path
}

/// A replica in a process of its own, which can be killed.
pub(crate) struct Replica {
    process: Child,
    /// What it logs, read as it comes: a full pipe would hold it up.
    lines: JoinHandle<Vec<Value>>,
    http: String,
}

impl Replica {
    pub(crate) fn start(config: &Path) -> Replica {
        let mut command = notifications();
        command
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(config);
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it runs");
        let output = BufReader::new(process.stdout.take().expect("stdout"));
        let json = |line: std::io::Result<String>| serde_json::from_str(&line.expect("text"));
        let mut lines = output
            .lines()
            .map(move |line| json(line).expect("every line is JSON"));
        let first: Value = lines.next().expect("a line");
        assert_eq!(first["service"], "notifications");
        let http = first["http"].as_str().expect("an address").to_owned();
        let lines = std::thread::spawn(move || lines.collect());
        Replica {
            process,
            lines,
            http: format!("http://{http}"),
        }
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let answer = reqwest::get(format!("{}{path}", self.http))
            .await
            .expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("text"))
    }

    /// How many partitions it consumes.
    pub(crate) async fn partitions(&self) -> i64 {
        let (_, metrics) = self.get("/metrics").await;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix("notifications_consumer_partitions "));
        value.map_or(0, |value| value.parse().expect("a number"))
    }

    /// As `kill -9` does.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("it ended");
    }

    /// Closes its stdin, expects a clean end, and answers what it logged.
    pub(crate) fn stop(mut self) -> Vec<Value> {
        drop(self.process.stdin.take());
        let lines = self.lines.join().expect("every line is JSON");
        assert!(
            self.process.wait().expect("it ended").success(),
            "{lines:#?}"
        );
        lines
    }
}

/// A config file for the database behind `pool`.
pub(crate) fn config_of(pool: &PgPool, kafka: &Kafka) -> PathBuf {
    let url = pool.connect_options().to_url_lossy();
    config_file(&format!(
        "brokers: [\"{}\"]\npostgres: {{connection_string: \"{url}\"}}\ntls: {{enabled: false}}\n\
         kafka: {{topic: {}, dead_letter_topic: {}, group: {}, session_timeout: 6s}}\n\
         grpc: {{listen: \"127.0.0.1:0\"}}\nhttp: {{listen: \"127.0.0.1:0\"}}\n",
        kafka.brokers, kafka.topic, kafka.dead_letter_topic, kafka.group
    ))
}

#[sqlx::test(migrations = false)]
async fn migrates_serves_and_stops_when_its_stdin_closes(pool: PgPool) {
    let config = config_of(&pool, &Kafka::new().await);
    let unmigrated = Replica::start(&config);
    assert_eq!(unmigrated.get("/readyz").await.0, 503);
    unmigrated.stop();
    for _ in ["on an empty database", "again"] {
        let migrated = notifications()
            .arg("migrate")
            .arg("--config")
            .arg(&config)
            .output()
            .expect("it ran");
        assert!(
            migrated.status.success(),
            "{}",
            String::from_utf8_lossy(&migrated.stderr)
        );
    }
    let replica = Replica::start(&config);
    let (status, report) = replica.get("/readyz").await;
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(
        (status, &report["database"], &report["kafka"]),
        (200, &"ok".into(), &"ok".into())
    );
    assert!(
        replica
            .stop()
            .iter()
            .any(|line| line["message"] == "stopping")
    );
}

#[test]
fn a_wrong_start_is_one_clear_line_and_64() {
    let wrong = config_file(
        "brokers: []\npostgres: {connection_string: \"postgres://127.0.0.1:1/x\"}\ntelgram: {}\n",
    );
    let away =
        config_file("brokers: []\npostgres: {connection_string: \"postgres://127.0.0.1:1/x\"}\n");
    for (arguments, says) in [
        (
            vec!["serve", "--config", "/nonexistent/config.yaml"],
            "/nonexistent/config.yaml",
        ),
        (vec!["--config", wrong.to_str().expect("text")], "telgram"),
        (
            vec!["migrate", "--config", away.to_str().expect("text")],
            "127.0.0.1:1",
        ),
    ] {
        let ended = notifications().args(&arguments).output().expect("it ran");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(64), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.starts_with("notifications: ") && said.contains(says),
            "{said}"
        );
    }
}

//! The process: commands, the line that says where it listens, exit codes.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use serde_json::{Value, json};
use sqlx::PgPool;

#[cfg(feature = "failpoints")]
use crate::test_app::eventually;
use crate::{kafka::Kafka, test_app::settings};

fn notifications() -> Command {
    Command::new(env!("CARGO_BIN_EXE_notifications"))
}

/// A config file, gone with the test.
pub(crate) struct ConfigFile(PathBuf);

impl ConfigFile {
    fn new(text: &str) -> ConfigFile {
        let name = format!("notifications-{}.yaml", uuid::Uuid::new_v4());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).expect("written");
        ConfigFile(path)
    }
}

impl Deref for ConfigFile {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        // it may be gone already
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A config for the database behind `pool`.
pub(crate) fn config_of(pool: &PgPool, kafka: &Kafka, changes: Value) -> ConfigFile {
    // JSON is YAML, but a dollar in it begins a variable
    ConfigFile::new(
        &settings(pool, kafka, changes)
            .to_string()
            .replace('$', "$$"),
    )
}

/// Runs a command that ends by itself and well, and answers its stdout.
pub(crate) fn run(config: &Path, arguments: &[&str]) -> String {
    attempt(config, arguments).unwrap_or_else(|said| panic!("{arguments:?}: {said}"))
}

/// Runs a command that ends by itself: its stdout, or what it says on stderr when it fails.
pub(crate) fn attempt(config: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = notifications();
    let ended = command
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .expect("it ran");
    if !ended.status.success() {
        return Err(String::from_utf8_lossy(&ended.stderr).into_owned());
    }
    Ok(String::from_utf8(ended.stdout).expect("text"))
}

/// Runs a command that refuses, with exit code 64, and answers the one line that it says.
pub(crate) fn refused(config: &Path, arguments: &[&str]) -> String {
    failed(config, arguments, 64)
}

fn failed(config: &Path, arguments: &[&str], code: i32) -> String {
    let mut command = notifications();
    let ended = command
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .expect("it ran");
    let said = String::from_utf8(ended.stderr).expect("text");
    assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("notifications: "), "{said}");
    said
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
        Replica::start_with(config, "")
    }

    /// `crash_points` as the crate `fail` reads them; without its feature nothing does.
    pub(crate) fn start_with(config: &Path, crash_points: &str) -> Replica {
        let mut command = notifications();
        command
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(config);
        let mut process = command
            .env("FAILPOINTS", crash_points)
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

    /// The series of `/metrics` whose names begin so, with their values.
    pub(crate) async fn metrics(&self, prefix: &str) -> BTreeMap<String, f64> {
        let (_, metrics) = self.get("/metrics").await;
        let lines = metrics.lines().filter(|line| line.starts_with(prefix));
        let series = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        });
        series.collect()
    }

    /// How many partitions it consumes.
    pub(crate) async fn partitions(&self) -> i64 {
        let consumed = self.metrics("notifications_consumer_partitions").await;
        consumed.values().sum::<f64>() as i64
    }

    /// Waits until a crash point has ended it.
    #[cfg(feature = "failpoints")]
    pub(crate) async fn aborted(mut self) {
        use std::os::unix::process::ExitStatusExt as _;
        let process = std::cell::RefCell::new(&mut self.process);
        eventually("the crash point is reached", async || {
            process.borrow_mut().try_wait().expect("a state").is_some()
        })
        .await;
        let ended = self.process.wait().expect("it ended");
        // 6: SIGABRT
        assert_eq!(ended.signal(), Some(6), "{ended}");
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

#[tokio::test]
async fn migrates_serves_and_stops_when_its_stdin_closes() {
    let pool = testkit::empty_database("notifications").await;
    let config = config_of(&pool, &Kafka::new().await, json!({}));
    let unmigrated = Replica::start(&config);
    assert_eq!(unmigrated.get("/readyz").await.0, 503);
    unmigrated.stop();
    for _ in ["on an empty database", "again"] {
        assert_eq!(run(&config, &["migrate"]), "");
    }
    let replica = Replica::start(&config);
    crate::test_app::eventually("a report", || async {
        let (status, report) = replica.get("/readyz").await;
        let report: Value = serde_json::from_str(&report).expect("JSON");
        status == 200 && report["database"] == "ok" && report["kafka"] == "ok"
    })
    .await;
    assert!(
        replica
            .stop()
            .iter()
            .any(|line| line["message"] == "stopping")
    );
}

#[test]
fn a_wrong_start_is_one_clear_line_and_64() {
    let wrong = ConfigFile::new(
        "brokers: []\npostgres: {connection_string: \"postgres://127.0.0.1:1/x\"}\ntelgram: {}\n",
    );
    let nowhere = Path::new("/nonexistent/config.yaml");
    for (config, arguments, says) in [
        (nowhere, &["serve"][..], "/nonexistent/config.yaml"),
        (&wrong, &[][..], "telgram"),
    ] {
        let said = refused(config, arguments);
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn a_database_that_stays_away_is_one_line_and_69() {
    let away = ConfigFile::new(
        "brokers: []\npostgres: {connection_string: \"postgres://127.0.0.1:1/x\"}\n",
    );
    let said = failed(&away, &["migrate", "--wait", "300ms"], 69);
    assert!(said.contains("127.0.0.1:1"), "{said}");
}

/// Columns, indexes and what is recorded, as the catalogue has them.
async fn schema(pool: &PgPool) -> Vec<String> {
    let statement =
        "SELECT concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid) FROM pg_index i
         JOIN pg_class c ON c.oid = indexrelid WHERE relnamespace = 'notifications'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', conrelid::regclass, conname, convalidated, pg_get_constraintdef(oid)) FROM pg_constraint
         WHERE connamespace = 'notifications'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default)
         FROM information_schema.columns WHERE table_schema = 'notifications'
         UNION ALL
         SELECT concat_ws(' ', version, description, success, encode(checksum, 'hex')) FROM notifications._sqlx_migrations
         ORDER BY 1";
    sqlx::query_scalar(statement)
        .fetch_all(pool)
        .await
        .expect("rows")
}

#[tokio::test]
async fn the_released_files_and_migrate_lead_to_the_same_schema() {
    let pool = crate::database().await;
    let released = schema(&pool).await;
    assert!(released.len() > 20, "{released:#?}");
    let drop = "DROP SCHEMA notifications CASCADE";
    sqlx::raw_sql(drop).execute(&pool).await.expect("dropped");
    let config = config_of(&pool, &Kafka::new().await, json!({}));
    assert_eq!(run(&config, &["migrate"]), "");
    assert_eq!(schema(&pool).await, released);
}

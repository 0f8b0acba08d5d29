//! A service as a process, for what only a process can show: that it can be killed, what memory it
//! takes.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    task::JoinSet,
};

/// For what a process has to do before it says something, or ends.
const BOUND: Duration = Duration::from_secs(60);

/// A file that is gone when the test is over.
pub struct File(PathBuf);

impl File {
    pub fn new(text: &str) -> File {
        let path = std::env::temp_dir().join(format!("test-{}", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).expect("a file");
        File(path)
    }

    pub fn path(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

/// The executable that cargo has built at `built`, or the one of its name in the folder
/// `TESTKIT_PROGRAMS`: of another profile, or a script that starts it with bounds.
pub fn program(built: &str) -> PathBuf {
    let built = Path::new(built);
    match (std::env::var_os("TESTKIT_PROGRAMS"), built.file_name()) {
        (Some(folder), Some(name)) => Path::new(&folder).join(name),
        _ => built.to_owned(),
    }
}

/// Runs a command of a service to its end.
pub async fn run(built: &str, config: &File, arguments: &[&str]) -> Output {
    let mut command = Command::new(program(built));
    command.args(arguments).arg("--config").arg(&config.0);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(BOUND, command.output()).await;
    ended.expect("an end").expect("it starts")
}

/// A service that runs; dropped, it is killed.
pub struct Process {
    child: Child,
    /// Kept apart: waiting for a child closes the one that it has.
    stdin: ChildStdin,
    grpc: SocketAddr,
    http: SocketAddr,
    /// What it logs belongs to the output of the test.
    _log: JoinSet<()>,
}

impl Process {
    /// `serve`. `crash_points` as the crate `fail` reads them; without the feature `failpoints`
    /// nothing does.
    pub async fn start(built: &str, config: &File, crash_points: &str) -> Process {
        let mut child = Command::new(program(built))
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
        let announced = tokio::time::timeout(BOUND, announced).await;
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

    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// A number of `/metrics` by its whole name, if it is there. In a process of its own no other
    /// test adds to it.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let metrics = reqwest::get(format!("http://{}/metrics", self.http)).await;
        let metrics = metrics.expect("metrics").text().await.expect("text");
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(|value| value.parse().expect("a number"))
    }

    /// The memory that it has, in KiB.
    pub fn memory(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The most memory that it has had, in KiB.
    pub fn most_memory(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("it runs");
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        let value = value.and_then(|value| value.trim().strip_suffix(" kB"));
        value.expect(name).parse().expect("a number")
    }

    /// `kill -9`.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    /// Sends it a signal, as `kill` names it.
    pub fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        let sent = std::process::Command::new("kill")
            .args([signal, &pid])
            .status();
        assert!(sent.expect("kill").success());
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Waits until it ends by itself: at a crash point, or because it was told to.
    pub async fn ended(&mut self) -> ExitStatus {
        ended(&mut self.child).await
    }

    /// Stops it as whatever started it does: its stdin is closed.
    pub async fn stop(self) -> ExitStatus {
        let Process {
            mut child, stdin, ..
        } = self;
        drop(stdin);
        ended(&mut child).await
    }
}

async fn ended(child: &mut Child) -> ExitStatus {
    let ended = tokio::time::timeout(BOUND, child.wait()).await;
    ended.expect("an end").expect("it ran")
}

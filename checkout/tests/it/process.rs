//! The service as a process: what only a process can show, being killed, and counters that no other test adds to.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

/// A running service; killed, not stopped.
pub(crate) struct Process {
    child: Child,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
}

impl Process {
    pub(crate) fn start(config: &Value) -> Self {
        Self::start_with(config, "")
    }

    /// `crash_points` as the crate `fail` reads them; without its feature nothing does.
    pub(crate) fn start_with(config: &Value, crash_points: &str) -> Self {
        let database = config["postgres"]["connection_string"].as_str().unwrap();
        let (_, database) = database.rsplit_once('/').unwrap();
        let path = std::env::temp_dir().join(format!("{database}-{}.yaml", std::process::id()));
        // JSON is YAML
        std::fs::write(&path, config.to_string()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_checkout"))
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(&path)
            .env("FAILPOINTS", crash_points)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let announced: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        // what it logs is shown with a test that fails
        std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .for_each(|line| println!("{line}"))
        });
        std::fs::remove_file(path).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address = |door: &str| announced[door].as_str().unwrap().parse().unwrap();
        Self {
            child,
            grpc: address("grpc"),
            http: address("http"),
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A number of `/metrics`, 0 while there is none. In a process of its own nobody else adds to it.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let url = format!("http://{}/metrics", self.http);
        let text = reqwest::get(url).await.unwrap().text().await.unwrap();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

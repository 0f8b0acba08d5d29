//! A LOMS of a test's own beside the one of a stack: the same database, topic and certificates, other settings, and a process
//! that can be sent signals.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use devstack::{certs, clients::channel, service::merge, stack::Stack};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::loms::loms_client::LomsClient;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    task::JoinSet,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::test_stack::{binaries, eventually};

/// A process that ends is waited for so long.
const END_BOUND: Duration = Duration::from_secs(30);

/// Dropped, it is killed.
pub(crate) struct Replica {
    child: Child,
    /// Kept apart: waiting for a child closes the one that it has, and that would stop it.
    _stdin: ChildStdin,
    config: PathBuf,
    ca: PathBuf,
    pub(crate) grpc: SocketAddr,
    /// Where it has a port in plaintext beside.
    pub(crate) plaintext: SocketAddr,
    pub(crate) http: SocketAddr,
    _log: JoinSet<()>,
}

impl Replica {
    /// On ports of its own, unless `settings` name some.
    pub(crate) async fn start(stack: &Stack, settings: &Value) -> Replica {
        Replica::run(configure(stack, settings), stack.ca()).await
    }

    /// What one says that does not start with `settings`.
    pub(crate) async fn refused(stack: &Stack, settings: &Value) -> Output {
        let mut command = serve(&configure(stack, settings)).await;
        let output = command.stdin(Stdio::null()).output();
        let output = tokio::time::timeout(END_BOUND, output).await;
        output.expect("an end").unwrap()
    }

    /// One that is told to go with `signal` once `starting` has come to its end: how it ends, and how soon.
    pub(crate) async fn stopped_while(
        stack: &Stack,
        settings: &Value,
        signal: Signal,
        starting: impl Future<Output = ()>,
    ) -> (ExitStatus, Duration) {
        let mut command = serve(&configure(stack, settings)).await;
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // kept apart, as in a replica
        let _stdin = child.stdin.take();
        let starting = tokio::time::timeout(END_BOUND, starting).await;
        starting.expect("it starts");
        let began = Instant::now();
        let pid = child.id().expect("it runs");
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
        let ended = tokio::time::timeout(END_BOUND, child.wait()).await;
        (ended.expect("an end").unwrap(), began.elapsed())
    }

    async fn run(config: PathBuf, ca: PathBuf) -> Replica {
        let mut child = serve(&config)
            .await
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let announced = async {
            loop {
                let line = lines.next_line().await.unwrap();
                let line = line.expect("it says where it listens");
                let said: Value = serde_json::from_str(&line).unwrap();
                if let (Some(grpc), Some(http)) = (said["grpc"].as_str(), said["http"].as_str()) {
                    let admin = said["admin"].as_str().unwrap_or(http);
                    let plaintext = said["plaintext"].as_str().unwrap_or(grpc);
                    let all = [grpc, http, admin, plaintext];
                    return all.map(|address| address.parse().unwrap());
                }
                println!("{line}");
            }
        };
        let announced = tokio::time::timeout(END_BOUND, announced).await;
        let [grpc, http, admin, plaintext] = announced.expect("a start");
        let mut log = JoinSet::new();
        log.spawn(async move {
            // shown when the test fails; a full pipe would hold the process up
            while let Ok(Some(line)) = lines.next_line().await {
                println!("{line}");
            }
        });
        let replica = Replica {
            _stdin: child.stdin.take().unwrap(),
            child,
            config,
            ca,
            grpc,
            plaintext,
            http,
            _log: log,
        };
        let ready = format!("http://{admin}/readyz");
        let client = devstack::clients::http_client().unwrap();
        eventually("a replica that is ready", async || {
            let answer = client.get(&ready).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        replica
    }

    /// Another process with the same settings, when this one has ended.
    pub(crate) async fn start_again(&self) -> Replica {
        Replica::run(self.config.clone(), self.ca.clone()).await
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("it runs");
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = tokio::time::timeout(END_BOUND, self.child.wait()).await;
        ended.expect("an end").unwrap()
    }

    /// Stops it with SIGTERM; it must be content.
    pub(crate) async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let ended = self.ended().await;
        assert!(ended.success(), "{ended}");
    }

    /// A line of TLS to it, on which nothing is shown.
    pub(crate) fn channel(&self) -> Channel {
        channel(self.grpc, self.tls()).unwrap()
    }

    /// A caller who shows nothing.
    pub(crate) fn stranger(&self) -> LomsClient<Channel> {
        LomsClient::new(self.channel())
    }

    /// A caller over TLS who shows the operator's certificate of a set.
    pub(crate) fn operator(&self, set: &Path) -> LomsClient<Channel> {
        let read = |file: PathBuf| std::fs::read(file).unwrap();
        let identity = Identity::from_pem(
            read(certs::cert(set, certs::OPERATOR)),
            read(certs::key(set, certs::OPERATOR)),
        );
        LomsClient::new(channel(self.grpc, self.tls().identity(identity)).unwrap())
    }

    fn tls(&self) -> ClientTlsConfig {
        let ca = Certificate::from_pem(std::fs::read(&self.ca).unwrap());
        ClientTlsConfig::new().ca_certificate(ca)
    }
}

/// The command that serves with `config`.
async fn serve(config: &Path) -> Command {
    let mut command = Command::new(binaries().await.service("loms").unwrap());
    command
        .args(["serve", "--stop-on-stdin-close", "--config"])
        .arg(config)
        .kill_on_drop(true);
    command
}

/// A file for a process beside the stack's own.
fn configure(stack: &Stack, settings: &Value) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let file = std::fs::read_to_string(stack.dir().join("loms.yaml")).unwrap();
    let mut config: Value = serde_yaml::from_str(&file).unwrap();
    config["grpc"]["listen"] = json!("127.0.0.1:0");
    config["http"]["listen"] = json!("127.0.0.1:0");
    merge(&mut config, settings);
    // a section that is set to nothing is left out
    if let Some(sections) = config.as_object_mut() {
        sections.retain(|_, section| !section.is_null());
    }
    let number = COUNT.fetch_add(1, Ordering::SeqCst);
    let file = stack.dir().join(format!("replica-{number}.yaml"));
    std::fs::write(&file, config.to_string()).unwrap();
    file
}

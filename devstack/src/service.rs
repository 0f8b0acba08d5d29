//! One service as a child process: started with a configuration file, found by the JSON line in which it says where it
//! listens, stopped by closing its stdin. If we are killed the stdin closes all the same. It may be killed, and started
//! again.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::timeout,
};

use crate::failure::Refused;

/// From the process to its address line: sockets, certificates, nothing that waits for a neighbour.
const START_BOUND: Duration = Duration::from_secs(30);
/// Longer than the 10 s of the services' own `shutdown_grace`.
const STOP_BOUND: Duration = Duration::from_secs(20);
/// What a service exits with when its configuration or its surroundings are wrong.
const MISCONFIGURED: i32 = 64;
/// How much of a log is shown when its service fails.
const TAIL_LINES: usize = 20;

/// The line on a service's stdout that says where it listens.
#[derive(Deserialize)]
struct Addresses {
    grpc: SocketAddr,
    http: SocketAddr,
    admin: Option<SocketAddr>,
}

/// A service that listens, unless it has been killed.
pub struct Service {
    name: &'static str,
    executable: PathBuf,
    config: PathBuf,
    log: PathBuf,
    running: Option<Running>,
    grpc: SocketAddr,
    http: SocketAddr,
    admin: Option<SocketAddr>,
}

struct Running {
    child: Child,
    /// Copies the rest of stdout to the log.
    copying: JoinSet<()>,
}

impl Service {
    /// Starts `<executable> serve` and waits until it says where it listens.
    pub async fn start(
        name: &'static str,
        executable: &Path,
        config: &Path,
        log: PathBuf,
    ) -> Result<Service> {
        let (running, Addresses { grpc, http, admin }) =
            run_serve(name, executable, config, &log).await?;
        Ok(Service {
            name,
            executable: executable.to_owned(),
            config: config.to_owned(),
            log,
            running: Some(running),
            grpc,
            http,
            admin,
        })
    }

    /// Kills it, as a crash does: nothing of its own can run any more.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut running) = self.running.take() {
            running.child.kill().await?;
            while running.copying.join_next().await.is_some() {}
        }
        Ok(())
    }

    /// Starts a killed service again with the configuration it had, which must name the ports.
    pub async fn start_again(&mut self) -> Result<()> {
        let (running, Addresses { grpc, http, admin }) =
            run_serve(self.name, &self.executable, &self.config, &self.log).await?;
        self.running = Some(running);
        self.admin = admin;
        ensure!(
            (grpc, http) == (self.grpc, self.http),
            "{} came back elsewhere",
            self.name
        );
        Ok(())
    }

    /// Stops it and starts another release of it, with the same configuration.
    pub async fn replace(&mut self, executable: &Path) -> Result<()> {
        self.stop().await?;
        executable.clone_into(&mut self.executable);
        self.start_again().await
    }

    /// Waits until it says that it is ready.
    pub async fn wait_ready(&mut self, bound: Duration) -> Result<()> {
        let http = crate::clients::http_client()?;
        let url = format!("http://{}/readyz", self.admin());
        let by = Instant::now() + bound;
        loop {
            self.check_alive()?;
            let answer = http.get(&url).send().await;
            let answer = answer.and_then(reqwest::Response::error_for_status);
            if answer.is_ok() {
                return Ok(());
            }
            ensure!(
                Instant::now() < by,
                "{} is not ready: {answer:?}\n{}",
                self.name,
                tail(&self.log)
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Its name, as in the contract.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its gRPC door.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Its HTTP door.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where it answers `/readyz` and `/metrics`: a door of its own, or the HTTP door.
    pub fn admin(&self) -> SocketAddr {
        self.admin.unwrap_or(self.http)
    }

    /// Its process, for a look at its memory, or for a harder end than [`Service::stop`].
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref()?.child.id()
    }

    /// Its configuration, which it reads when it starts.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Its log, stdout and stderr together.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// An error with the end of its log, if it has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            bail!("{} was killed", self.name)
        };
        match running.child.try_wait()? {
            Some(ended) => bail!(
                "{} ended by itself ({ended}); its log ends with\n{}",
                self.name,
                tail(&self.log)
            ),
            None => Ok(()),
        }
    }

    /// Closes its stdin and waits; kills it when it takes too long, which is an error.
    pub async fn stop(&mut self) -> Result<()> {
        let Some(Running {
            mut child,
            mut copying,
        }) = self.running.take()
        else {
            return Ok(());
        };
        drop(child.stdin.take());
        let Ok(ended) = timeout(STOP_BOUND, child.wait()).await else {
            child.kill().await?;
            bail!(
                "{} did not stop in {} s and was killed\n{}",
                self.name,
                STOP_BOUND.as_secs(),
                tail(&self.log)
            );
        };
        let ended = ended?;
        while copying.join_next().await.is_some() {}
        ensure!(
            ended.success(),
            "{} did not stop cleanly ({ended}); its log ends with\n{}",
            self.name,
            tail(&self.log)
        );
        Ok(())
    }
}

async fn run_serve(
    name: &str,
    executable: &Path,
    config: &Path,
    log: &Path,
) -> Result<(Running, Addresses)> {
    // what a process wrote before it was killed stays
    let file = File::options().append(true).create(true).open(log);
    let mut child = Command::new(executable)
        .args(["serve", "--stop-on-stdin-close", "--config"])
        .arg(config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(file.context("open the log")?)
        // Ctrl-C in a terminal is for us; we stop the services one after another
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", executable.display()))?;
    let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let found = timeout(START_BOUND, find_addresses(&mut lines)).await;
    let (addresses, before) =
        found.map_err(|_| anyhow!("{name} did not say where it listens\n{}", tail(log)))??;
    let Some(addresses) = addresses else {
        let ended = child.wait().await?;
        return Err(refusal(name, ended, log));
    };
    let mut copying = JoinSet::new();
    copying.spawn(copy(before, lines, log.to_owned()));
    Ok((Running { child, copying }, addresses))
}

/// Puts `changes` over a configuration, key by key; null takes a key away (RFC 7396).
pub fn merge(into: &mut Value, changes: &Value) {
    let Value::Object(changes) = changes else {
        *into = changes.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, change) in changes {
        if !change.is_null() {
            merge(&mut into[key], change);
        } else if let Some(into) = into.as_object_mut() {
            into.remove(key);
        }
    }
}

/// Runs a service's other command (`migrate`, `audit`, ..) to its end and answers its stdout.
pub async fn run(
    name: &str,
    executable: &Path,
    arguments: &[&str],
    config: &Path,
) -> Result<Finished> {
    let output = Command::new(executable)
        .args(arguments)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("start {}", executable.display()))?;
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.code() == Some(MISCONFIGURED) {
        return Err(Refused(stderr).into());
    }
    let stdout = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(Finished {
        command: format!("{name} {}", arguments.join(" ")),
        status: output.status,
        stdout,
        stderr,
    })
}

/// A command that ran to its end.
pub struct Finished {
    command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Its stdout, or an error with all it printed.
    pub fn expect_success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "`{}`: {}\n{}\n{}",
            self.command,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// The addresses, and what was logged before them: a broker that is away is complained of at once. No addresses: it ended.
async fn find_addresses(
    lines: &mut Lines<BufReader<ChildStdout>>,
) -> std::io::Result<(Option<Addresses>, Vec<String>)> {
    let mut before = Vec::new();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line) {
            Ok(addresses) => return Ok((Some(addresses), before)),
            Err(_) => before.push(line),
        }
    }
    Ok((None, before))
}

async fn copy(before: Vec<String>, mut lines: Lines<BufReader<ChildStdout>>, log: PathBuf) {
    // the service must never block on a full pipe: without a log its lines are read and lost
    let mut file = tokio::fs::OpenOptions::new()
        .append(true)
        .open(log)
        .await
        .ok();
    if let Some(file) = &mut file
        && !before.is_empty()
    {
        let _ = file.write_all((before.join("\n") + "\n").as_bytes()).await;
    }
    while let Ok(Some(mut line)) = lines.next_line().await {
        line.push('\n');
        if let Some(file) = &mut file {
            let _ = file.write_all(line.as_bytes()).await;
        }
    }
    if let Some(file) = &mut file {
        let _ = file.flush().await;
    }
}

fn refusal(name: &str, ended: ExitStatus, log: &Path) -> anyhow::Error {
    let said = tail(log);
    match ended.code() {
        Some(MISCONFIGURED) => Refused(said).into(),
        _ => anyhow!("{name} did not start ({ended}); it said\n{said}"),
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

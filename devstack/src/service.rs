//! One service as a child process: started with a configuration file, found by the JSON line in which it says where it
//! listens, stopped by closing its stdin. If we are killed the stdin closes all the same.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Deserialize;
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

/// The first line of a service's stdout.
#[derive(Deserialize)]
struct Addresses {
    grpc: SocketAddr,
    http: SocketAddr,
}

/// A service that listens.
pub struct Service {
    name: &'static str,
    child: Child,
    log: PathBuf,
    grpc: SocketAddr,
    http: SocketAddr,
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
        let mut child = Command::new(executable)
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).context("make the log")?)
            // Ctrl-C in a terminal is for us; we stop the services one after another
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", executable.display()))?;
        let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let first = timeout(START_BOUND, lines.next_line()).await;
        let first =
            first.map_err(|_| anyhow!("{name} did not say where it listens\n{}", tail(&log)))??;
        let Some(line) = first else {
            let ended = child.wait().await?;
            return Err(refusal(name, ended, &log));
        };
        let Addresses { grpc, http } = serde_json::from_str(&line)
            .with_context(|| format!("{name} said instead of its addresses: {line}"))?;
        let mut copying = JoinSet::new();
        copying.spawn(copy(lines, log.clone()));
        Ok(Service {
            name,
            child,
            log,
            grpc,
            http,
            copying,
        })
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

    /// Its process, for a look at its memory, or for a harder end than [`Service::stop`].
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its log, stdout and stderr together.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// An error with the end of its log, if it has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(ended) => bail!(
                "{} ended by itself ({ended}); its log ends with\n{}",
                self.name,
                tail(&self.log)
            ),
            None => Ok(()),
        }
    }

    /// Closes its stdin and waits; kills it when it takes too long, which is an error.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let Ok(ended) = timeout(STOP_BOUND, self.child.wait()).await else {
            self.child.kill().await?;
            bail!(
                "{} did not stop in {} s and was killed\n{}",
                self.name,
                STOP_BOUND.as_secs(),
                tail(&self.log)
            );
        };
        let ended = ended?;
        while self.copying.join_next().await.is_some() {}
        ensure!(
            ended.success(),
            "{} did not stop cleanly ({ended}); its log ends with\n{}",
            self.name,
            tail(&self.log)
        );
        Ok(())
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

async fn copy(mut lines: Lines<BufReader<ChildStdout>>, log: PathBuf) {
    // the service must never block on a full pipe: without a log its lines are read and lost
    let mut file = tokio::fs::OpenOptions::new()
        .append(true)
        .open(log)
        .await
        .ok();
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

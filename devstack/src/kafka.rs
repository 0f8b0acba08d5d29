//! An Apache Kafka of our own, from Maven Central: one node that listens on loopback and keeps its data in a folder of its
//! own. A child process owns it (`kafka_owner`), so that it does not outlive us; it can be killed and started again.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::{failure::Misuse, owner::Owner, ports::Reserved};

/// Two starts of Java and Kafka's own, which take 10 s on two idle cores.
const START_BOUND: Duration = Duration::from_secs(120);
const STOP_BOUND: Duration = Duration::from_secs(30);
/// What Apache Kafka 4 runs on.
const LEAST_JAVA: u32 = 17;
/// Maven Central now and then drops a connection.
const DOWNLOADS: usize = 3;

/// Java and Kafka's jars.
#[derive(Debug, Clone)]
pub struct Tools {
    libs: PathBuf,
    version: String,
}

impl Tools {
    /// Finds Java in PATH and the jars in the workspace's target folder; Maven downloads them the first time.
    pub async fn find() -> Result<Tools> {
        let java = java_version().await.ok_or_else(|| {
            Misuse::error(
                "Apache Kafka needs java in PATH",
                "install Java 17 or later",
            )
        })?;
        if java < LEAST_JAVA {
            let what = format!("Apache Kafka needs Java {LEAST_JAVA}, java in PATH is {java}");
            return Err(Misuse::error(what, "install a later one"));
        }
        let libs = workspace().join("target/kafka/libs");
        if !libs.is_dir() {
            download(&libs).await?;
        }
        let version = std::fs::read_dir(&libs)?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .find_map(|name| {
                Some(
                    name.strip_prefix("kafka_2.13-")?
                        .strip_suffix(".jar")?
                        .into(),
                )
            });
        let remedy = format!("remove {}, it is downloaded again", libs.display());
        let version = version.ok_or_else(|| Misuse::error("Kafka's own jar is missing", remedy))?;
        Ok(Tools { libs, version })
    }

    /// Which Kafka it is.
    pub fn version(&self) -> &str {
        &self.version
    }
}

fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// The first number of `openjdk version "17.0.15" 2025-04-15`.
async fn java_version() -> Option<u32> {
    let output = Command::new("java").arg("-version").output().await.ok()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (_, version) = said.split_once(" version \"")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Into a folder beside it first: an interrupted download never looks finished.
async fn download(libs: &Path) -> Result<()> {
    let part = libs.with_extension("part");
    let _ = std::fs::remove_dir_all(&part);
    std::fs::create_dir_all(&part).context("make a folder for Kafka's jars")?;
    for _ in 0..DOWNLOADS {
        let maven = Command::new("mvn")
            .args(["-q", "-B", "-Dstyle.color=never", "-f"])
            .arg(workspace().join(".ci/kafka.pom.xml"))
            .arg("dependency:copy-dependencies")
            .arg(format!("-DoutputDirectory={}", part.display()))
            .kill_on_drop(true)
            .output()
            .await;
        let maven = maven.map_err(|error| {
            Misuse::error(
                format!("running mvn, which downloads Apache Kafka: {error}"),
                "install Maven",
            )
        })?;
        if maven.status.success() {
            return std::fs::rename(&part, libs).context("keep Kafka's jars");
        }
        eprint!("{}", String::from_utf8_lossy(&maven.stdout));
    }
    Err(Misuse::error(
        "Maven could not download Apache Kafka",
        "see the lines above",
    ))
}

/// What the owner says on its stdout when the broker answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Started {}

/// A broker that answers, or is away for a while.
pub struct Kafka {
    owner: Owner,
    /// Clients, and its own controller.
    ports: [Reserved; 2],
    dir: tempfile::TempDir,
}

impl Kafka {
    /// Starts it with an empty log; its owner is `devstack` (this executable).
    pub async fn start(devstack: &Path, tools: &Tools) -> Result<Kafka> {
        let ports = [Reserved::any()?, Reserved::any()?];
        let dir = tempfile::Builder::new()
            .prefix("devstack-kafka-")
            .tempdir()
            .context("make a folder for Kafka")?;
        let mut command = Command::new(devstack);
        command.arg("kafka-owner").args([dir.path(), &tools.libs]);
        command.args(ports.iter().map(|port| port.address().port().to_string()));
        let (owner, Started {}) = Owner::spawn("Apache Kafka", command, START_BOUND).await?;
        Ok(Kafka { owner, ports, dir })
    }

    /// `host:port`, the same as long as this lives.
    pub fn address(&self) -> String {
        self.ports[0].address().to_string()
    }

    /// Kills it: SIGKILL, nothing of its own can run any more.
    pub async fn crash(&mut self) -> Result<()> {
        self.owner.crash().await
    }

    /// Starts it again on its data and waits until it answers.
    pub async fn recover(&mut self) -> Result<()> {
        self.owner.recover().await
    }

    /// Ends it; its data goes with it.
    pub async fn stop(self) -> Result<()> {
        self.owner.stop(STOP_BOUND).await?;
        // its owner has removed it, as it would if we had been killed
        let left = self.dir.keep();
        ensure!(!left.exists(), "{} is still there", left.display());
        Ok(())
    }
}

//! The child process that owns an Apache Kafka: it formats the log and starts Java, and when its stdin ends, kills Java and
//! removes the data, which nobody wants any more. Meanwhile it kills the broker and starts it again when it is asked to.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::process::{Child, Command};

use crate::{
    kafka::Started,
    owner::{Owned, obey},
    service::tail,
};

/// What the broker logs when it serves.
const SERVES: &str = "Kafka Server started";
/// A start on a busy machine that replays a log takes half of it.
const START_BOUND: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);
/// 16 bytes in base64url. Always the same: no two clusters of ours ever meet.
const CLUSTER_ID: &str = "devstack-one-node-AAAA";

/// Runs until stdin ends. `dir` is removed at the end; `libs` has the jars; clients come to `port`, the controller, which
/// is the same process, listens on the other one.
pub fn run(dir: &Path, libs: &Path, port: u16, controller_port: u16) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(own(dir, libs, port, controller_port));
    // the thread that reads stdin may still wait there
    runtime.shutdown_background();
    let removed = std::fs::remove_dir_all(dir).context("remove the data of Kafka");
    outcome.and(removed)
}

async fn own(dir: &Path, libs: &Path, port: u16, controller_port: u16) -> Result<()> {
    let properties = dir.join("server.properties");
    std::fs::write(&properties, server_properties(dir, port, controller_port))
        .context("write server.properties")?;
    let mut broker = Broker {
        log: dir.join("server.out"),
        properties,
        libs: libs.to_owned(),
        java: None,
    };
    let started = async {
        broker.format().await?;
        broker.recover().await
    };
    let outcome = match started.await {
        Ok(()) => obey(&mut broker, &Started {}).await,
        Err(error) => Err(error),
    };
    outcome.and(broker.crash().await)
}

/// One node that is its own controller, so every replication factor is 1; a group's first member need not wait for others.
fn server_properties(dir: &Path, port: u16, controller_port: u16) -> String {
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
",
        dir.display()
    )
}

struct Broker {
    libs: PathBuf,
    properties: PathBuf,
    log: PathBuf,
    java: Option<Child>,
}

impl Broker {
    fn java(&self) -> Command {
        let mut java = Command::new("java");
        java.args(["-Xmx512m", "-cp"])
            .arg(self.libs.join("*"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        java
    }

    async fn format(&self) -> Result<()> {
        let formatted = self
            .java()
            .args(["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c"])
            .arg(&self.properties)
            .output()
            .await
            .context("run java")?;
        ensure!(
            formatted.status.success(),
            "formatting Kafka's log: {}\n{}",
            formatted.status,
            String::from_utf8_lossy(&formatted.stderr)
        );
        Ok(())
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.java {
            Some(java) => Ok(java.try_wait()?),
            None => Ok(None),
        }
    }
}

impl Owned for Broker {
    async fn crash(&mut self) -> Result<()> {
        match self.java.take() {
            Some(mut java) => java.kill().await.context("kill java"),
            None => Ok(()),
        }
    }

    async fn recover(&mut self) -> Result<()> {
        let log = File::create(&self.log).context("make Kafka's log")?;
        let java = self
            .java()
            .arg("kafka.Kafka")
            .arg(&self.properties)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start java")?;
        self.java = Some(java);
        let by = Instant::now() + START_BOUND;
        while !std::fs::read_to_string(&self.log)
            .unwrap_or_default()
            .contains(SERVES)
        {
            if let Some(ended) = self.ended()? {
                bail!("Kafka ended ({ended}):\n{}", tail(&self.log));
            }
            ensure!(
                Instant::now() < by,
                "Kafka did not start in {} s:\n{}",
                START_BOUND.as_secs(),
                tail(&self.log)
            );
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}

//! A child process that owns a server which would outlive us: it is asked by lines on its stdin, answers by lines on its
//! stdout and, when its stdin ends, however we end, ends the server too.

use std::{io::Write as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    signal::unix::SignalKind,
    time::timeout,
};

/// A crash or a start that was asked for: a server that replays its log on a busy machine.
const ANSWER_BOUND: Duration = Duration::from_secs(90);

/// What may be asked of an owner.
const CRASH: &str = "crash";
const RECOVER: &str = "recover";
const DONE: &str = "done";

/// Our end of the child.
pub(crate) struct Owner {
    what: &'static str,
    child: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Owner {
    /// Runs the command, an owner of `what`, and waits for its first line, which says where the server is.
    pub(crate) async fn spawn<T: DeserializeOwned>(
        what: &'static str,
        mut command: Command,
        bound: Duration,
    ) -> Result<(Owner, T)> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C in a terminal must reach us first: the server is stopped last
            .process_group(0)
            .spawn()
            .with_context(|| format!("start the owner of {what}"))?;
        let stdout = child.stdout.take().context("no stdout of an owner")?;
        let mut owner = Owner {
            what,
            child,
            answers: BufReader::new(stdout).lines(),
        };
        let line = owner.answer(bound).await?;
        let started = serde_json::from_str(&line)
            .with_context(|| format!("parse the address of {what}: {line}"))?;
        Ok((owner, started))
    }

    /// Ends the server as a crash does: without a word to those who use it, and without anything written on the way out.
    pub(crate) async fn crash(&mut self) -> Result<()> {
        self.ask(CRASH).await
    }

    /// Starts it again on the same port and the same data, and waits until it answers.
    pub(crate) async fn recover(&mut self) -> Result<()> {
        self.ask(RECOVER).await
    }

    async fn ask(&mut self, what: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no stdin of an owner")?;
        stdin.write_all(format!("{what}\n").as_bytes()).await?;
        let answer = self.answer(ANSWER_BOUND).await?;
        ensure!(answer == DONE, "the owner of {} said {answer}", self.what);
        Ok(())
    }

    async fn answer(&mut self, bound: Duration) -> Result<String> {
        let what = self.what;
        let line = timeout(bound, self.answers.next_line()).await;
        let line = line
            .with_context(|| format!("{what} did not answer in {} s", bound.as_secs()))?
            .with_context(|| format!("read from the owner of {what}"))?;
        match line {
            Some(line) => Ok(line),
            None => {
                self.child.wait().await?;
                bail!("{what} does not run; the lines above say why")
            }
        }
    }

    /// Closes its stdin and waits until the server is stopped.
    pub(crate) async fn stop(mut self, bound: Duration) -> Result<()> {
        drop(self.child.stdin.take());
        let ended = timeout(bound, self.child.wait())
            .await
            .with_context(|| format!("{} did not stop in {} s", self.what, bound.as_secs()))??;
        ensure!(
            ended.success(),
            "{} did not stop cleanly: {ended}",
            self.what
        );
        Ok(())
    }
}

/// What an owner does to its server when it is asked.
pub(crate) trait Owned {
    async fn crash(&mut self) -> Result<()>;
    async fn recover(&mut self) -> Result<()>;
}

/// The child's side: says where the server is, then does what it is asked until stdin ends, or SIGTERM.
pub(crate) async fn obey(server: &mut impl Owned, started: &impl Serialize) -> Result<()> {
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    say(&serde_json::to_string(started)?)?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line?,
            _ = terminate.recv() => None,
        };
        match line.as_deref() {
            Some(CRASH) => server.crash().await?,
            Some(RECOVER) => server.recover().await?,
            Some(other) => bail!("an owner cannot {other}"),
            None => return Ok(()),
        }
        say(DONE)?;
    }
}

/// Not println!, which panics when nobody listens any more: the server must still be stopped then.
fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").context("write an answer")?;
    stdout.flush().context("write an answer")
}

//! Ctrl-C and SIGTERM end the work, not the program: the stack is stopped first. A second signal ends the program at once.

use std::{future::Future, os::unix::process::ExitStatusExt as _, process::ExitCode};

use anyhow::Result;
use nix::{
    sys::signal::{Signal as Kind, kill},
    unistd::Pid,
};
use tokio::{
    process::Command,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::failure::{Interrupted, Misuse};

/// Both signals that ask a program to end.
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    /// Takes the signals over from their default action.
    pub fn listen() -> Result<Stop> {
        Ok(Stop {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next signal.
    pub async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Runs `work` until it ends or a signal arrives, which is an [`Interrupted`] error.
    pub async fn interrupts<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.asked() => Err(Interrupted.into()),
        }
    }

    /// Runs the clean-up; a signal meanwhile exits at once. The children notice that their stdin is closed.
    pub async fn impatient<T>(&mut self, cleanup: impl Future<Output = T>) -> T {
        tokio::select! {
            outcome = cleanup => outcome,
            () = self.asked() => std::process::exit(130),
        }
    }

    /// Runs a command with more variables in its environment and answers with its exit code. It is in our process
    /// group, so that Ctrl-C reaches it by itself; SIGTERM is passed on.
    pub async fn run_with(
        &mut self,
        variables: &[(&str, &str)],
        program: &str,
        arguments: &[String],
    ) -> Result<ExitCode> {
        let mut child = Command::new(program)
            .args(arguments)
            .envs(variables.iter().copied())
            .spawn()
            .map_err(|error| {
                Misuse::error(
                    format!("running {program}: {error}"),
                    "name a program that is there",
                )
            })?;
        let ended = loop {
            tokio::select! {
                ended = child.wait() => break ended?,
                () = self.asked() => {
                    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                        // it may have ended meanwhile
                        let _ = kill(Pid::from_raw(pid), Kind::SIGTERM);
                    }
                }
            }
        };
        // as a shell has it: 128 and the signal's number
        let code = ended
            .code()
            .unwrap_or_else(|| 128 + ended.signal().unwrap_or_default());
        Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
    }
}

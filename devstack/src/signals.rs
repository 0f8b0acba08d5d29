//! Ctrl-C and SIGTERM end the work, not the program: the stack is stopped first. A second signal ends the program at once.

use std::future::Future;

use anyhow::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Interrupted;

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
}

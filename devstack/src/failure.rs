//! How a command fails: what the person who runs it can put right is one line and exit code 64, the rest is exit code 1.

use std::process::ExitCode;

use anyhow::Result;

/// EX_USAGE of sysexits.h: the command or its surroundings are wrong, not the program.
const MISUSE: u8 = 64;
/// What a shell reports for a command that Ctrl-C ended: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// Something to put right before the command can work: what it is, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {remedy}")]
pub struct Misuse {
    what: String,
    remedy: String,
}

impl Misuse {
    /// A misuse as an error ready for `?`.
    pub fn error(what: impl Into<String>, remedy: impl Into<String>) -> anyhow::Error {
        let (what, remedy) = (what.into(), remedy.into());
        anyhow::Error::new(Misuse { what, remedy })
    }
}

/// A program of ours refused to start and has said why in one line of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Ctrl-C or SIGTERM ended the work.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Prints the error on one line (the cause chain joined by colons) and names the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(Refused(line)) = error.downcast_ref::<Refused>() {
        eprintln!("{line}");
        return ExitCode::from(MISUSE);
    }
    eprintln!("devstack: {error:#}");
    if error.is::<Misuse>() {
        ExitCode::from(MISUSE)
    } else if error.is::<Interrupted>() {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::FAILURE
    }
}

/// How a command ends, whose result was printed before it cleaned up: a clean-up that failed is reported, and takes nothing
/// from what was found before it.
pub fn after_cleanup<T>(outcome: Result<T>, cleaned: Result<()>) -> Result<T> {
    match (outcome, cleaned) {
        (outcome, Ok(())) => outcome,
        (Ok(_), Err(cleaning)) => Err(cleaning.context("cleaning up")),
        (Err(error), Err(cleaning)) => {
            eprintln!("devstack: cleaning up: {cleaning:#}");
            Err(error)
        }
    }
}

/// [`after_cleanup`] of a command of others, whose exit code is the result.
pub fn code_after_cleanup(outcome: Result<ExitCode>, cleaned: Result<()>) -> Result<ExitCode> {
    if let (Ok(_), Err(cleaning)) = (&outcome, &cleaned) {
        eprintln!("devstack: cleaning up: {cleaning:#}");
        return outcome;
    }
    after_cleanup(outcome, cleaned)
}

/// The code for a command line that clap refuses.
pub fn usage() -> ExitCode {
    ExitCode::from(MISUSE)
}

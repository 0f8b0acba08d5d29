//! What a walk shows and counts, and how it ends when something is not as it should be.

use std::fmt::Debug;

use anyhow::{Result, bail};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use crate::clients::{Answer, reason};

/// The steps and checks so far.
#[derive(Debug, Default)]
pub struct Walk {
    steps: usize,
    checks: usize,
}

impl Walk {
    /// How many steps there were, and how many checks in them.
    pub fn counts(&self) -> (usize, usize) {
        (self.steps, self.checks)
    }

    /// Announces what comes next.
    pub(super) fn step(&mut self, title: &str) {
        self.steps += 1;
        println!("\n{:>2}. {title}", self.steps);
    }

    /// Shows something that is not checked.
    pub(super) fn show(&self, text: &str) {
        for line in text.lines() {
            println!("      {line}");
        }
    }

    /// Shows what came out, or ends the walk with what should have.
    pub(super) fn check<T: PartialEq + Debug>(
        &mut self,
        what: &str,
        actual: T,
        expected: T,
    ) -> Result<()> {
        self.checks += 1;
        if actual != expected {
            println!("  ✗ {what}");
            bail!("{what}\n  expected {expected:?}\n  actual   {actual:?}");
        }
        println!("  ✓ {what}: {actual:?}");
        Ok(())
    }

    /// An answer over gRPC that must be OK.
    pub(super) fn accepted<T>(
        &mut self,
        what: &str,
        answer: Result<Response<T>, Status>,
    ) -> Result<T> {
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let message = answer
            .as_ref()
            .map_or_else(|status| status.message().to_owned(), |_| String::new());
        self.check(what, (code, message), (Code::Ok, String::new()))?;
        Ok(answer?.into_inner())
    }

    /// An answer over gRPC that must be a refusal, with its reason (empty where the contract has none).
    pub(super) fn refused<T: Debug>(
        &mut self,
        what: &str,
        answer: Result<Response<T>, Status>,
        code: Code,
        why: &str,
    ) -> Result<Status> {
        match answer {
            Ok(response) => bail!(
                "{what}\n  expected {code:?} {why}\n  actual   {:?}",
                response.into_inner()
            ),
            Err(status) => {
                self.check(what, (status.code(), reason(&status).as_str()), (code, why))?;
                self.show(status.message());
                Ok(status)
            }
        }
    }

    /// A refusal for which the contract promises no reason.
    pub(super) fn refused_without_reason<T: Debug>(
        &mut self,
        what: &str,
        answer: Result<Response<T>, Status>,
        code: Code,
    ) -> Result<()> {
        let actual = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        self.check(what, actual, code)
    }

    /// A refusal because of the order's status, which must be named in the details.
    pub(super) fn refused_by_status<T: Debug>(
        &mut self,
        what: &str,
        answer: Result<Response<T>, Status>,
        named: &str,
    ) -> Result<()> {
        let Err(status) = answer else {
            bail!("{what}\n  expected a refusal\n  actual   OK")
        };
        self.check(what, status.code(), Code::FailedPrecondition)?;
        let details = format!("{:?}", status.get_error_details());
        self.check(
            "the details name the status",
            (details.contains(named), named),
            (true, named),
        )
    }

    /// An answer over HTTP: its status and the code in its body, 0 when it is no error.
    pub(super) fn answered(
        &mut self,
        what: &str,
        answer: &Answer,
        status: u16,
        code: i64,
    ) -> Result<()> {
        let actual = (
            answer.status,
            answer.body["code"].as_i64().unwrap_or_default(),
        );
        if actual != (status, code) {
            self.show(&answer.body.to_string());
        }
        self.check(what, actual, (status, code))
    }
}

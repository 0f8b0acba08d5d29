//! Calls that may meet a service that is being killed: what came back is counted, what may not come back is noted, and what
//! is safe to repeat is repeated until there is an answer.

use std::{
    collections::BTreeMap,
    error::Error as _,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rand::{Rng as _, rngs::StdRng};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};

use super::facts::Facts;
use crate::{binaries::SERVICES, clients::Clients};

/// A service answers within 5 s (`limits.request_timeout`); a call without any answer for so long hangs.
const HANGS: Duration = Duration::from_secs(15);
/// Between two tries of one call.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(400);
/// So many surprises are kept word for word; the rest is counted.
const KEPT: usize = 20;

/// What can be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    AddToCart,
    Purchase,
    CreateOrder,
    OrderPayed,
    CancelOrder,
    Stocks,
    ReceiveStock,
    GetHistory,
}

impl Method {
    /// The index in [`SERVICES`] of who answers it.
    fn service(self) -> usize {
        match self {
            Method::AddToCart | Method::Purchase => 0,
            Method::GetHistory => 2,
            _ => 1,
        }
    }
}

/// What a caller can make of what came back.
pub(super) enum Answer<T> {
    Done(T),
    /// FAILED_PRECONDITION: certainly not done.
    Refused(Status),
    /// It may have been done.
    Unknown,
}

/// A database that was gone, and when each service was first seen to work with it again.
#[derive(Debug, Clone)]
pub struct Mark {
    /// When it was told to stop.
    pub from: Instant,
    /// When it had stopped: a call that began later has met the new one.
    pub(super) gone: Instant,
    /// When it answered again, which is its own affair: replaying a log takes as long as the disk does.
    pub(super) answered: Option<Instant>,
    pub(super) back: [Option<Instant>; 3],
}

impl Mark {
    /// Seconds until the database answered again.
    pub fn outage(&self) -> Option<f64> {
        Some((self.answered? - self.from).as_secs_f64())
    }

    /// Seconds from then until each service answered a call; `None`: it has not.
    pub fn recoveries(&self) -> [Option<f64>; 3] {
        let since = |at: Instant| Some(at.saturating_duration_since(self.answered?).as_secs_f64());
        self.back.map(|at| at.and_then(since))
    }
}

/// A call that was not answered by its service's own decision, but for want of a service.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    pub method: Method,
    pub code: Code,
    pub ended: Instant,
}

/// How calls came out.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// By method and code; a connection that broke has the code UNAVAILABLE.
    pub codes: BTreeMap<(Method, &'static str), u64>,
    pub failures: Vec<Failure>,
    /// What no fault excuses.
    pub surprises: Vec<String>,
    pub surprised: u64,
    pub marks: Vec<Mark>,
}

impl Tally {
    fn surprise(&mut self, what: String) {
        self.surprised += 1;
        if self.surprises.len() < KEPT {
            self.surprises.push(what);
        }
    }

    /// Counts a call that its service did not decide, and names how it came out.
    fn failed(&mut self, method: Method, about: &str, status: &Status) -> &'static str {
        let Some((name, code)) = judge(status) else {
            let (code, message) = (status.code(), status.message());
            self.surprise(format!("{method:?} of {about}: {code:?}: {message}"));
            return "unexpected";
        };
        // a full queue is a decision, and no fault has to excuse it
        if code != Code::ResourceExhausted {
            self.failures.push(Failure {
                method,
                code,
                ended: Instant::now(),
            });
        }
        name
    }

    /// Calls that came out so, whatever the method.
    pub fn count(&self, code: &str) -> u64 {
        let counts = self.codes.iter().filter(|((_, known), _)| *known == code);
        counts.map(|(_, count)| count).sum()
    }
}

/// What all callers write into.
#[derive(Default)]
pub struct Ledger {
    facts: Mutex<Facts>,
    tally: Mutex<Tally>,
}

impl Ledger {
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The database was told to stop at `from` and has stopped now.
    pub fn database_gone(&self, from: Instant) {
        self.tally().marks.push(Mark {
            from,
            gone: Instant::now(),
            answered: None,
            back: [None; 3],
        });
    }

    /// It answers again.
    pub fn database_answers(&self) {
        if let Some(last) = self.tally().marks.last_mut() {
            last.answered = Some(Instant::now());
        }
    }

    /// Whether every service was seen to work again after every restart of the database.
    pub fn is_back(&self) -> bool {
        let tally = self.tally();
        let mut recoveries = tally.marks.iter().flat_map(Mark::recoveries);
        recoveries.all(|seconds| seconds.is_some())
    }
}

/// One caller of every door.
pub(super) struct Caller {
    pub clients: Clients,
    pub ledger: Arc<Ledger>,
    pub random: StdRng,
    /// Cancelled: begin nothing new.
    pub closing: CancellationToken,
    /// Cancelled: do not even try again.
    pub closed: CancellationToken,
    /// How often, of a thousand calls, this one does not wait for an answer.
    pub impatience: u32,
}

impl Caller {
    /// One call about something that a person can look for. A caller who is impatient now and then leaves before there is
    /// an answer, which the service must bear.
    pub(super) async fn call<T>(
        &mut self,
        method: Method,
        about: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Answer<T> {
        let leaves = self.random.random_ratio(self.impatience, 1000);
        let patience = leaves.then(|| Duration::from_millis(self.random.random_range(1..60)));
        self.observe(method, about, patience, call).await
    }

    /// Two calls at once, whose answers are found out by asking again.
    pub(super) async fn both<A, B>(
        &self,
        about: &str,
        one: (Method, impl Future<Output = Result<Response<A>, Status>>),
        other: (Method, impl Future<Output = Result<Response<B>, Status>>),
    ) {
        tokio::join!(
            self.observe(one.0, about, None, one.1),
            self.observe(other.0, about, None, other.1),
        );
    }

    async fn observe<T>(
        &self,
        method: Method,
        about: &str,
        patience: Option<Duration>,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Answer<T> {
        let began = Instant::now();
        let outcome = tokio::time::timeout(patience.unwrap_or(HANGS), call).await;
        let mut tally = self.ledger.tally();
        let (code, answer) = match outcome {
            Ok(Ok(response)) => ("OK", Answer::Done(response.into_inner())),
            Ok(Err(status)) if status.code() == Code::FailedPrecondition => {
                ("FAILED_PRECONDITION", Answer::Refused(status))
            }
            Ok(Err(status)) => (tally.failed(method, about, &status), Answer::Unknown),
            Err(_) if patience.is_some() => ("left", Answer::Unknown),
            Err(_) => {
                let seconds = HANGS.as_secs();
                tally.surprise(format!("{method:?} of {about}: no answer in {seconds} s"));
                ("no answer", Answer::Unknown)
            }
        };
        *tally.codes.entry((method, code)).or_default() += 1;
        if !matches!(answer, Answer::Unknown) {
            let marks = tally.marks.iter_mut().filter(|mark| mark.gone <= began);
            for mark in marks {
                mark.back[method.service()].get_or_insert_with(Instant::now);
            }
        }
        answer
    }

    /// Repeats a call that may be repeated until it is answered. `None`: not before the end, which is noted.
    pub(super) async fn insist<T, F>(
        &mut self,
        method: Method,
        about: &str,
        mut call: impl FnMut() -> F,
    ) -> Option<Result<T, Status>>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut wait = FIRST_WAIT;
        loop {
            match self.call(method, about, call()).await {
                Answer::Done(response) => return Some(Ok(response)),
                Answer::Refused(status) => return Some(Err(status)),
                Answer::Unknown => {}
            }
            let pause = wait.mul_f64(self.random.random_range(0.5..1.0));
            wait = (wait * 2).min(LONGEST_WAIT);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.closed.cancelled() => {
                    let service = SERVICES[method.service()];
                    let what = format!("{method:?} of {about}: {service} has not answered to the end");
                    self.ledger.tally().surprise(what);
                    return None;
                }
            }
        }
    }

    /// Thinks for a while, `most` at most; then whether to go on.
    pub(super) async fn think(&mut self, most: Duration) -> bool {
        let pause = most.mul_f64(self.random.random());
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = self.closing.cancelled() => false,
        }
    }
}

/// What a call may come back with while services are killed, and under which name it is counted; `None`: never.
fn judge(status: &Status) -> Option<(&'static str, Code)> {
    // made on our side of a connection that broke, whatever code tonic gave it
    if status.source().is_some() {
        return Some(("broken connection", Code::Unavailable));
    }
    let name = match status.code() {
        Code::Unavailable => "UNAVAILABLE",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::Cancelled => "CANCELLED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        _ => return None,
    };
    Some((name, status.code()))
}

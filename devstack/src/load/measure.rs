//! What a run is measured by: latencies in a histogram, answers by code, a warm-up that is left out. The open loop counts
//! an answer from the moment its call was due, so that a stall shows in every call that it held up.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use anyhow::Result;
use hdrhistogram::Histogram;
use rand::{SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// Three digits, to a minute.
const LONGEST_US: u64 = 60_000_000;

/// How calls are made.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// So many callers, each with its next call when it has the answer to its last.
    Closed { clients: usize },
    /// So many calls a second, whether or not the earlier ones have been answered; at most `clients` are on their way.
    Open { rate: f64, clients: usize },
}

/// How long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) warmup: Duration,
    pub(super) measured: Duration,
}

/// What came back. Calls that were turned away are counted apart: how fast a no is says nothing of how fast the work is.
#[derive(Debug)]
pub(super) struct Tally {
    latency: Histogram<u64>,
    refusals: Histogram<u64>,
    codes: BTreeMap<String, u64>,
}

/// What a call that was done is counted as begins so.
const DONE: &str = "OK";

/// The figures of a run, in milliseconds and calls a second, of the calls that were done.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figures {
    pub(super) calls: u64,
    /// Those that were not.
    pub(super) refused: u64,
    pub(super) refused_p99_ms: f64,
    pub(super) per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p90_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) p999_ms: f64,
    pub(super) max_ms: f64,
    /// By gRPC code and, for orders, by status.
    pub(super) answers: BTreeMap<String, u64>,
}

impl Tally {
    fn new() -> Result<Tally> {
        Ok(Tally {
            latency: Histogram::new_with_max(LONGEST_US, 3)?,
            refusals: Histogram::new_with_max(LONGEST_US, 3)?,
            codes: BTreeMap::new(),
        })
    }

    fn note(&mut self, took: Duration, answer: String) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(LONGEST_US);
        let histogram = if answer.starts_with(DONE) {
            &mut self.latency
        } else {
            &mut self.refusals
        };
        histogram.saturating_record(micros.max(1));
        *self.codes.entry(answer).or_default() += 1;
    }

    fn add(&mut self, other: Tally) -> Result<()> {
        self.latency.add(other.latency)?;
        self.refusals.add(other.refusals)?;
        for (answer, count) in other.codes {
            *self.codes.entry(answer).or_default() += count;
        }
        Ok(())
    }

    fn figures(self, measured: Duration) -> Figures {
        let at = |quantile| self.latency.value_at_quantile(quantile) as f64 / 1000.0;
        Figures {
            calls: self.latency.len() + self.refusals.len(),
            refused: self.refusals.len(),
            refused_p99_ms: self.refusals.value_at_quantile(0.99) as f64 / 1000.0,
            per_second: self.latency.len() as f64 / measured.as_secs_f64(),
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: self.latency.max() as f64 / 1000.0,
            answers: self.codes,
        }
    }
}

/// A caller of its own: what it draws, and which of them it is.
pub(super) struct Caller {
    pub(super) index: usize,
    pub(super) random: StdRng,
}

/// Makes calls for as long as `span` says. `call` answers what to count it as; `None` when there is nothing left to call.
pub(super) async fn run<F, Fut>(pace: Pace, span: Span, seed: u64, call: F) -> Result<Figures>
where
    F: Fn(Caller) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = (Caller, Option<String>)> + Send,
{
    let began = Instant::now();
    let window = (began + span.warmup, began + span.warmup + span.measured);
    let tally = match pace {
        Pace::Closed { clients } => {
            let tally = closed(clients, window, seed, call).await?;
            // what ended after the window is not in it
            return Ok(tally.figures(span.measured));
        }
        Pace::Open { rate, clients } => open(rate, clients, began, window, seed, call).await?,
    };
    // a schedule that could not be kept has taken longer than it should
    Ok(tally.figures(span.measured.max(window.0.elapsed())))
}

async fn closed<F, Fut>(
    clients: usize,
    (from, until): (Instant, Instant),
    seed: u64,
    call: F,
) -> Result<Tally>
where
    F: Fn(Caller) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = (Caller, Option<String>)> + Send,
{
    let mut callers = JoinSet::new();
    for index in 0..clients {
        let call = call.clone();
        callers.spawn(async move {
            let mut tally = Tally::new()?;
            let random = StdRng::seed_from_u64(seed.wrapping_add(index as u64));
            let mut caller = Caller { index, random };
            loop {
                let asked = Instant::now();
                if asked >= until {
                    return anyhow::Ok(tally);
                }
                let (back, answer) = call(caller).await;
                caller = back;
                let Some(answer) = answer else {
                    return Ok(tally);
                };
                let answered = Instant::now();
                // by when it ended: what was asked before the window and answered in it was work of the window
                if answered >= from && answered < until {
                    tally.note(answered - asked, answer);
                }
            }
        });
    }
    together(callers).await
}

async fn open<F, Fut>(
    rate: f64,
    clients: usize,
    began: Instant,
    (from, until): (Instant, Instant),
    seed: u64,
    call: F,
) -> Result<Tally>
where
    F: Fn(Caller) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = (Caller, Option<String>)> + Send,
{
    let mut calls = JoinSet::new();
    let room = Arc::new(Semaphore::new(clients));
    let mut tally = Tally::new()?;
    for index in 0.. {
        let due = began + Duration::from_secs_f64(index as f64 / rate);
        if due >= until {
            break;
        }
        sleep_until(due).await;
        // a call that has to wait for room is late from the moment it was due
        let permit = room.clone().acquire_owned().await?;
        let call = call.clone();
        calls.spawn(async move {
            let random = StdRng::seed_from_u64(seed.wrapping_add(index as u64));
            let (_, answer) = call(Caller { index, random }).await;
            drop(permit);
            answer
                .filter(|_| due >= from)
                .map(|answer| (Instant::now() - due, answer))
        });
        while let Some(done) = calls.try_join_next() {
            if let Some((took, answer)) = done? {
                tally.note(took, answer);
            }
        }
    }
    while let Some(done) = calls.join_next().await {
        if let Some((took, answer)) = done? {
            tally.note(took, answer);
        }
    }
    Ok(tally)
}

async fn together(mut callers: JoinSet<Result<Tally>>) -> Result<Tally> {
    let mut all = Tally::new()?;
    while let Some(tally) = callers.join_next().await {
        all.add(tally??)?;
    }
    Ok(all)
}

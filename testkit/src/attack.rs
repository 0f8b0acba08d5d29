//! A service that is attacked, and a caller beside the attack who must not notice it.
//!
//! `ATTACK_SCALE=20` makes attacks larger. `ATTACK_CORE=1` is for a run on a quiet machine of a
//! release build: the caller runs on that core, which is the service's, and the bounds of time and
//! memory hold that `.ci/attacks` is there for.

pub mod floods;
pub mod unread;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use reqwest::Client;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;

use crate::process::{File, Process};

/// The longest that a call of another client may take beside a small attack, on any machine.
const BOUND: Duration = Duration::from_secs(10);
/// What a small attack may add to the memory of a process that has been asked once, in KiB.
const GROWTH: u64 = 96 * 1024;

/// For 99 of 100 calls of others, beside a large attack.
const P99: Duration = Duration::from_millis(100);
/// How many times longer than without the attack they may take.
const P99_TIMES: u32 = 5;
/// A service's memory limit, and what it goes back to, in KiB.
const MOST_MEMORY: u64 = 256 * 1024;
const MEMORY_AFTERWARDS: u64 = 100 * 1024;

/// How many of a small attack's `count` make the one that was asked for.
pub fn scaled(count: u32) -> u32 {
    let scale = std::env::var("ATTACK_SCALE").unwrap_or_else(|_| "1".to_owned());
    count * scale.parse::<u32>().expect("ATTACK_SCALE is a number")
}

fn core() -> Option<usize> {
    let core = std::env::var("ATTACK_CORE").ok()?;
    Some(core.parse().expect("ATTACK_CORE is a number"))
}

/// A caller who calls a hundred times a second, on a thread of its own.
struct Probe {
    calls: Arc<Mutex<Calls>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Calls {
    took: Vec<Duration>,
    failed: Vec<String>,
}

impl Calls {
    fn p99(&mut self) -> Duration {
        self.took.sort_unstable();
        let index = self.took.len() * 99 / 100;
        self.took.get(index).copied().unwrap_or_default()
    }
}

impl Probe {
    fn start<M, C>(make: M) -> Probe
    where
        M: FnOnce() -> C + Send + 'static,
        C: AsyncFnMut() -> Result<(), String>,
    {
        let calls: Arc<Mutex<Calls>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (noted, stopped) = (calls.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            if let Some(core) = core() {
                let mut cores = CpuSet::new();
                cores.set(core);
                sched_setaffinity(None, &cores).expect("a core of this machine");
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let calling = async move { call_until(&stopped, &noted, make()).await };
            runtime.expect("a runtime").block_on(calling);
        });
        Probe {
            calls,
            stop,
            thread: Some(thread),
        }
    }

    /// Waits for so many more answers; a failure is one of the test.
    async fn answered(&self, count: usize) {
        let wanted = locked(&self.calls).took.len() + count;
        let by = Instant::now() + BOUND * u32::try_from(count).unwrap_or(u32::MAX);
        while locked(&self.calls).took.len() < wanted {
            let failed = locked(&self.calls).failed.first().cloned();
            assert_eq!(failed, None, "beside the attack");
            assert!(Instant::now() < by, "no answers beside the attack");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn take(&self) -> Calls {
        std::mem::take(&mut *locked(&self.calls))
    }
}

async fn call_until(
    stopped: &AtomicBool,
    noted: &Mutex<Calls>,
    mut call: impl AsyncFnMut() -> Result<(), String>,
) {
    while !stopped.load(Ordering::Relaxed) {
        let began = Instant::now();
        let called = tokio::time::timeout(BOUND, call()).await;
        let called = called.unwrap_or_else(|_| Err(format!("no answer in {BOUND:?}")));
        let took = began.elapsed();
        match called {
            Ok(()) => locked(noted).took.push(took),
            Err(said) => locked(noted).failed.push(said),
        }
        tokio::time::sleep(Duration::from_millis(10).saturating_sub(took)).await;
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// A service in a process of its own, and its caller.
pub struct Attacked {
    pub process: Process,
    service: &'static str,
    config: File,
    web: Client,
    probe: Probe,
    memory: u64,
    /// Of the caller's calls before the attack.
    p99: Duration,
}

impl Attacked {
    /// `make` has the caller's connections: it runs on the thread that calls.
    pub async fn start<M, C>(
        service: &'static str,
        (process, config): (Process, File),
        make: M,
    ) -> Attacked
    where
        M: FnOnce() -> C + Send + 'static,
        C: AsyncFnMut() -> Result<(), String>,
    {
        let probe = Probe::start(make);
        probe
            .answered(if core().is_some() { 300 } else { 20 })
            .await;
        let p99 = probe.take().p99();
        Attacked {
            memory: process.most_memory(),
            process,
            service,
            config,
            web: Client::new(),
            probe,
            p99,
        }
    }

    pub fn grpc(&self) -> SocketAddr {
        self.process.grpc()
    }

    /// Others are answered, and it is ready.
    pub async fn is_alive(&self) {
        self.probe.answered(5).await;
        let ready = format!("http://{}/readyz", self.process.http());
        let ready = self.web.get(ready).send().await.expect("an answer");
        assert_eq!(ready.status(), 200);
    }

    /// What others were refused so far is no failure.
    pub fn forget_refusals(&self) {
        locked(&self.probe.calls).failed.clear();
    }

    /// Calls of a method by their code, as the metrics count them.
    pub async fn counted(&self, status: &str, method: &str) -> u64 {
        let metrics = format!("http://{}/metrics", self.process.http());
        let metrics = self.web.get(metrics).send().await.expect("metrics");
        let metrics = metrics.text().await.expect("text");
        let bytes = metrics.len();
        assert!(bytes < 1 << 20, "{bytes} bytes of metrics");
        let name = format!(
            "{}_histogram_response_time_seconds_count{{method=\"{method}\",status=\"{status}\"}} ",
            self.service
        );
        let found = metrics.lines().find_map(|line| line.strip_prefix(&name));
        found.map_or(0, |count| count.parse().expect("a number"))
    }

    /// It has not grown much and goes on, and others have not noticed. It is stopped; its
    /// configuration is left for what looks at its books.
    pub async fn finish(self) -> File {
        self.is_alive().await;
        let mut calls = self.probe.take();
        drop(self.probe);
        let grown = self.process.most_memory().saturating_sub(self.memory);
        let (answered, p99) = (calls.took.len(), calls.p99());
        let longest = calls.took.last().copied().unwrap_or_default();
        println!(
            "{} MiB, {} more; {answered} calls of others, p99 {p99:?} (before {:?}), longest {longest:?}",
            self.memory / 1024,
            grown / 1024,
            self.p99,
        );
        assert_eq!(calls.failed.first(), None, "{} failed", calls.failed.len());
        if core().is_some() {
            assert!(p99 < P99, "others waited {p99:?}");
            assert!(p99 <= P99_TIMES * self.p99, "{p99:?} and {:?}", self.p99);
            let most = self.process.most_memory();
            assert!(most < MOST_MEMORY, "{most} KiB");
            let by = Instant::now() + Duration::from_secs(60);
            while self.process.memory() >= MEMORY_AFTERWARDS {
                assert!(Instant::now() < by, "{} KiB stay", self.process.memory());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        } else {
            assert!(grown < GROWTH, "{grown} KiB");
        }
        let ended = self.process.stop().await;
        assert!(ended.success(), "{ended:?}");
        self.config
    }
}

/// A call over HTTP, for a caller beside an attack.
///
/// # Errors
/// Any answer but 200.
pub async fn post(web: &Client, url: &str, body: &Value) -> Result<(), String> {
    let answer = web.post(url).json(body).send().await;
    let answer = answer.map_err(|error| format!("{error:?}"))?;
    match answer.status().as_u16() {
        200 => answer
            .bytes()
            .await
            .map(drop)
            .map_err(|error| format!("{error:?}")),
        status => Err(format!("{status} of {url}")),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

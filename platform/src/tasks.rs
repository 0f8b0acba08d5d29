//! Everything that runs beside a request. A worker runs until it is told to stop; a tracked task finishes what its
//! caller began, even when the caller has gone. The only place that spawns.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
};

use futures::FutureExt as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::call::Call;

/// A handle on the tasks of one process; clones share them.
#[derive(Clone, Default)]
pub struct Tasks(Arc<Inner>);

#[derive(Default)]
struct Inner {
    tracked: TaskTracker,
    workers: TaskTracker,
    stopping: CancellationToken,
    failed: CancellationToken,
    failure: Mutex<Option<anyhow::Error>>,
}

impl Inner {
    async fn supervise(
        self: Arc<Self>,
        name: &'static str,
        work: impl Future<Output = anyhow::Result<()>>,
    ) {
        let ended = AssertUnwindSafe(work).catch_unwind().await;
        if self.stopping.is_cancelled() {
            if let Ok(Err(error)) = ended {
                tracing::warn!(worker = name, error = %format!("{error:#}"), "worker failed while stopping");
            }
            return;
        }
        self.fail(match ended {
            Ok(Ok(())) => anyhow::anyhow!("worker {name} ended unasked"),
            Ok(Err(error)) => error.context(format!("worker {name} failed")),
            Err(_) => anyhow::anyhow!("worker {name} panicked"),
        });
    }

    fn fail(&self, error: anyhow::Error) {
        if let Ok(mut failure) = self.failure.lock() {
            failure.get_or_insert(error);
        }
        self.failed.cancel();
    }
}

/// A tracked task panicked; the panic is in the log.
#[derive(Debug, thiserror::Error)]
#[error("the task panicked")]
pub struct TaskFailed;

impl Tasks {
    pub fn new() -> Self {
        Tasks::default()
    }

    /// Starts a worker. It must run until [`Tasks::stopping`]; one that ends before that, or panics, stops the process
    /// with exit code 1, because a service without its relay or sweeper only looks alive.
    pub fn worker(
        &self,
        name: &'static str,
        work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.0.workers.spawn(self.0.clone().supervise(name, work));
    }

    /// Starts a worker on a thread of its own: one whose steps many calls wait for. Among those calls it would stand in
    /// line after each answer of its database; the kernel lets a thread that has slept go first.
    pub fn worker_thread(
        &self,
        name: &'static str,
        work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let inner = self.0.clone();
        let work = inner
            .workers
            .track_future(inner.clone().supervise(name, work));
        let started = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .and_then(|runtime| {
                let thread = std::thread::Builder::new().name(name.to_owned());
                thread.spawn(move || runtime.block_on(work))
            });
        if let Err(error) = started {
            inner.fail(anyhow::Error::from(error).context(format!("start worker {name}")));
        }
    }

    /// Runs `work` to its end even if the caller is dropped, so that a transaction is never cut in half.
    ///
    /// # Errors
    /// [`TaskFailed`] when it panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, TaskFailed> {
        let tracked = self.0.tracked.spawn(Call::carried(work).in_current_span());
        tracked.await.map_err(|error| {
            tracing::error!(task = name, error = %error, "task panicked");
            TaskFailed
        })
    }

    /// Starts tracked work that nobody waits for.
    pub fn detach(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.tracked.spawn(Call::followed(work).in_current_span());
    }

    /// Cancelled when workers have to finish.
    pub fn stopping(&self) -> CancellationToken {
        self.0.stopping.clone()
    }

    /// Resolves when a worker has failed.
    pub async fn failed(&self) {
        self.0.failed.cancelled().await;
    }

    /// What made a worker fail, once.
    pub fn failure(&self) -> Option<anyhow::Error> {
        self.0
            .failure
            .lock()
            .ok()
            .and_then(|mut failure| failure.take())
    }

    /// Waits for tracked work, then stops the workers and waits for them. The caller bounds it.
    pub async fn drain(&self) {
        self.0.tracked.close();
        self.0.tracked.wait().await;
        self.0.stopping.cancel();
        self.0.workers.close();
        self.0.workers.wait().await;
    }
}

/// For the doors themselves, which end before the tasks are drained.
#[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
pub(crate) fn spawn<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    tokio::spawn(work)
}

/// Like [`spawn`], for whoever may be dropped when the runtime has ended: then the work is dropped too.
#[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
pub(crate) fn spawn_if_running(work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn tracked_work_outlives_its_caller() {
        let (tasks, done) = (Tasks::new(), Arc::new(AtomicBool::new(false)));
        let (go, wait) = oneshot::channel::<()>();
        let flag = done.clone();
        let mut call = Box::pin(tasks.run("write", async move {
            wait.await.ok();
            flag.store(true, Ordering::SeqCst);
        }));
        assert!(futures::poll!(&mut call).is_pending());
        drop(call);
        go.send(()).unwrap();
        tasks.drain().await;
        assert!(done.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn a_worker_that_ends_unasked_is_a_failure() {
        let tasks = Tasks::new();
        tasks.worker("relay", async { Ok(()) });
        tasks.failed().await;
        assert_eq!(
            tasks.failure().unwrap().to_string(),
            "worker relay ended unasked"
        );
    }

    #[tokio::test]
    async fn a_worker_that_is_told_to_stop_is_none() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        tasks.worker("relay", async move {
            stopping.cancelled().await;
            Ok(())
        });
        tasks.drain().await;
        assert!(tasks.failure().is_none());
    }

    #[tokio::test]
    async fn a_worker_with_a_thread_is_watched_and_waited_for_like_any_other() {
        let (tasks, done) = (Tasks::new(), Arc::new(AtomicBool::new(false)));
        let (stopping, flag) = (tasks.stopping(), done.clone());
        tasks.worker_thread("placer", async move {
            stopping.cancelled().await;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            flag.store(true, Ordering::SeqCst);
            Ok(())
        });
        tasks.drain().await;
        assert!(done.load(Ordering::SeqCst));

        let tasks = Tasks::new();
        tasks.worker_thread("placer", async { panic!("on purpose") });
        tasks.failed().await;
        assert_eq!(
            tasks.failure().unwrap().to_string(),
            "worker placer panicked"
        );
    }
}

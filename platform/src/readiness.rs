//! Whether a process should get calls: what `/readyz` says, and what keeps grpc.health.v1 at the same. Checked in the
//! background, on a connection of its own.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use serde_json::{Map, Value};
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    pg::{self, Database, Pool, State},
    tasks::Tasks,
};

type Note = Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// What readiness follows: the database and its schema. Notes (broker, upstreams) are shown and alerted on, but never make
/// the service unready.
pub struct Readiness {
    database: Database,
    notes: Vec<(&'static str, Note)>,
}

impl Readiness {
    pub fn new(database: Database) -> Self {
        Readiness {
            database,
            notes: Vec::new(),
        }
    }

    pub(crate) fn database(&self) -> Database {
        self.database.clone()
    }

    /// Adds a line to the report: `ok`, or what is wrong.
    pub fn note<F>(
        mut self,
        name: &'static str,
        check: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = String> + Send + 'static,
    {
        self.notes.push((name, Box::new(move || Box::pin(check()))));
        self
    }
}

/// How long one check may take.
const CHECK_BOUND: Duration = Duration::from_secs(2);
/// Between two checks; whoever asks is answered from the last one.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// What is reported before the first check.
const UNKNOWN: &str = "not checked yet";

/// What the last checks have found. Asking costs nothing and waits for nobody, whatever hangs.
pub(crate) struct Health {
    stopping: AtomicBool,
    database: Mutex<Option<State>>,
    notes: Mutex<Vec<(&'static str, String)>>,
    /// When somebody asks, the notes are checked for the next who does.
    asked: watch::Sender<()>,
}

impl Health {
    pub(crate) fn new() -> Self {
        Health {
            stopping: AtomicBool::new(false),
            database: Mutex::default(),
            notes: Mutex::default(),
            asked: watch::Sender::new(()),
        }
    }

    /// Waits until somebody asks. `false`: the process stops.
    async fn asked(&self, stopping: &CancellationToken) -> bool {
        let mut asked = self.asked.subscribe();
        tokio::select! {
            () = stopping.cancelled() => false,
            asked = asked.changed() => asked.is_ok(),
        }
    }

    /// From now on this process is not ready, whatever its database says.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// Whether this process should get calls, and why.
    pub(crate) fn report(&self) -> (bool, Value) {
        let (ready, database) = self.state();
        self.asked.send_replace(());
        let mut report = Map::new();
        report.insert("ready".into(), ready.into());
        report.insert("database".into(), database.into());
        if self.stopping.load(Ordering::SeqCst) {
            report.insert("process".into(), "stopping".into());
        }
        for (name, said) in locked(&self.notes).iter() {
            report.insert((*name).into(), said.clone().into());
        }
        (ready, Value::Object(report))
    }

    fn state(&self) -> (bool, &'static str) {
        let database = locked(&self.database);
        let ready = *database == Some(State::Ok) && !self.stopping.load(Ordering::SeqCst);
        (ready, database.as_ref().map_or(UNKNOWN, State::report))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what is known up to date, and grpc.health.v1 at what `/readyz` would say; not serving until that is known. A caller
/// who asks before the first check must not hear that the service is unknown, nor that all is well.
pub(crate) async fn watch(
    tasks: &Tasks,
    readiness: Readiness,
    health: Arc<Health>,
    reporter: HealthReporter,
    name: &'static str,
) {
    set(&reporter, name, false).await;
    for (index, (note, check)) in readiness.notes.into_iter().enumerate() {
        locked(&health.notes).push((note, UNKNOWN.to_owned()));
        let (health, stopping) = (health.clone(), tasks.stopping());
        tasks.worker("readiness note", async move {
            let mut ticks = ticks();
            // brokers and upstreams are not asked by somebody whom nobody asks
            while health.asked(&stopping).await && next(&mut ticks, &stopping).await {
                let said = tokio::select! {
                    said = tokio::time::timeout(CHECK_BOUND, check()) => said,
                    () = stopping.cancelled() => break,
                };
                let said = said.unwrap_or_else(|_| "no answer".into());
                if let Some(known) = locked(&health.notes).get_mut(index) {
                    known.1 = said;
                }
            }
            Ok(())
        });
    }
    let database = readiness.database;
    // one of its own: callers who use up theirs say nothing about the database
    let connection = database.for_readiness();
    let stopping = tasks.stopping();
    tasks.worker("health", async move {
        let (mut was, mut ticks) = (None, ticks());
        while next(&mut ticks, &stopping).await {
            let found = tokio::select! {
                found = ask(&database, &connection) => found,
                () = stopping.cancelled() => break,
            };
            *locked(&health.database) = Some(found);
            let (ready, said) = health.state();
            if was != Some(ready) {
                tracing::info!(ready, database = said, "readiness changed");
                set(&reporter, name, ready).await;
                was = Some(ready);
            }
        }
        connection.close();
        Ok(())
    });
}

fn ticks() -> Interval {
    let mut ticks = tokio::time::interval(CHECK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits for the next check. `false`: the process stops.
async fn next(ticks: &mut Interval, stopping: &CancellationToken) -> bool {
    tokio::select! {
        () = stopping.cancelled() => false,
        _ = ticks.tick() => true,
    }
}

/// Looks over a connection that is there, or finds out why there is none.
async fn ask(database: &Database, connection: &Pool) -> State {
    let look = connection.with_connection(async |db| match database.look(db).await? {
        // the session is to be replaced: another server may have taken over
        State::ReadOnly => Err(pg::Error::read_only()),
        found => Ok(found),
    });
    match tokio::time::timeout(CHECK_BOUND, look).await {
        Ok(Ok(found)) => {
            database.note(found.clone());
            found
        }
        // whoever tried to connect, or gave the connection back, has noted it
        Ok(Err(_)) => match database.state() {
            State::Ok => State::Away("the connection was lost".to_owned()),
            known => known,
        },
        Err(_) => State::Away("no answer".to_owned()),
    }
}

async fn set(reporter: &HealthReporter, name: &str, ready: bool) {
    let status = if ready {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in ["", name] {
        reporter.set_service_status(service, status).await;
    }
}

#[cfg(test)]
mod tests {
    use sqlx::migrate::Migrator;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    static NOTHING: Migrator = Migrator::DEFAULT;

    #[tokio::test]
    async fn whoever_asks_before_the_first_check_hears_not_serving() {
        let config =
            serde_json::json!({"connection_string": "postgres://nobody@127.0.0.1:1/nothing"});
        let config = serde_json::from_value(config).unwrap();
        let database = Database::new("readiness", &config, &NOTHING).unwrap();
        let health = Arc::new(Health::new());
        let (reporter, service) = tonic_health::server::health_reporter();
        let tasks = Tasks::new();
        // nothing else runs in this thread: the watcher has not looked yet
        let readiness = Readiness::new(database);
        let watching = watch(&tasks, readiness, health, reporter, "loms.Loms");
        watching.await;
        for name in ["", "loms.Loms"] {
            let request = HealthCheckRequest {
                service: name.into(),
            };
            let answer = HealthClient::new(service.clone()).check(request).await;
            let status = answer.unwrap().into_inner().status();
            assert_eq!(status.as_str_name(), "NOT_SERVING", "{name}");
        }
    }
}

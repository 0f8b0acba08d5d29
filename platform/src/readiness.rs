//! Whether a process should get calls: what `/readyz` says, and what keeps grpc.health.v1 at the same.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use serde_json::{Map, Value};
use sqlx::migrate::Migrator;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{pg, pool::Pool, state_log, tasks::Tasks};

type Note = Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// What readiness follows: the database and its schema. Notes (broker, neighbours) are shown and alerted on, but never
/// make the service unready.
pub struct Readiness {
    pool: Pool,
    migrator: &'static Migrator,
    notes: Vec<(&'static str, Note)>,
}

impl Readiness {
    pub fn new(pool: Pool, migrator: &'static Migrator) -> Self {
        Readiness {
            pool,
            migrator,
            notes: Vec::new(),
        }
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

/// How long one check may take; readiness is asked every few seconds.
const CHECK_BOUND: Duration = Duration::from_secs(2);

pub(crate) struct Health {
    readiness: Readiness,
    stopping: AtomicBool,
}

impl Health {
    pub(crate) fn new(readiness: Readiness) -> Self {
        Health {
            readiness,
            stopping: AtomicBool::new(false),
        }
    }

    /// From now on this process is not ready, whatever its database says.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// Whether this process should get calls, and why.
    pub(crate) async fn report(&self) -> (bool, Value) {
        let database = self.database().await;
        let stopping = self.stopping.load(Ordering::SeqCst);
        let ready = database == "ok" && !stopping;
        let mut report = Map::new();
        report.insert("ready".into(), ready.into());
        report.insert("database".into(), database.into());
        if stopping {
            report.insert("process".into(), "stopping".into());
        }
        for (name, check) in &self.readiness.notes {
            let said = tokio::time::timeout(CHECK_BOUND, check()).await;
            report.insert(
                (*name).into(),
                said.unwrap_or_else(|_| "no answer".into()).into(),
            );
        }
        (ready, Value::Object(report))
    }

    async fn database(&self) -> &'static str {
        let migrator = self.readiness.migrator;
        let check = self
            .readiness
            .pool
            .round(async |db| pg::schema_is_current(db, migrator).await);
        match tokio::time::timeout(CHECK_BOUND, check).await {
            Ok(Ok(true)) => "ok",
            Ok(Ok(false)) => "schema is behind: run migrate",
            Ok(Err(sqlx::Error::Database(error))) if error.code().as_deref() == Some("42P01") => {
                "schema is missing: run migrate"
            }
            _ => "away",
        }
    }
}

/// Keeps grpc.health.v1 at what `/readyz` would say; not serving until that is known. A caller who asks before the first check
/// must not hear that the service is unknown, nor that all is well.
pub(crate) async fn watch(
    tasks: &Tasks,
    health: Arc<Health>,
    reporter: HealthReporter,
    name: &'static str,
) {
    set(&reporter, name, false).await;
    let stopping = tasks.stopping();
    tasks.worker("health", async move {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        let mut was = None;
        loop {
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                _ = every.tick() => {}
            }
            let database = health.database().await;
            if database == "ok" {
                state_log::DATABASE.works();
            }
            let ready = database == "ok" && !health.stopping.load(Ordering::SeqCst);
            if was != Some(ready) {
                tracing::info!(ready, database, "readiness changed");
                set(&reporter, name, ready).await;
                was = Some(ready);
            }
        }
    });
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
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    static NOTHING: Migrator = Migrator::DEFAULT;

    #[tokio::test]
    async fn whoever_asks_before_the_first_check_hears_not_serving() {
        let config =
            serde_json::json!({"connection_string": "postgres://nobody@127.0.0.1:1/nothing"});
        let config = serde_json::from_value(config).unwrap();
        let pool = Pool::new(&config, "readiness", 1).unwrap();
        let health = Arc::new(Health::new(Readiness::new(pool, &NOTHING)));
        let (reporter, service) = tonic_health::server::health_reporter();
        let tasks = Tasks::new();
        // nothing else runs in this thread: the watcher has not looked yet
        watch(&tasks, health, reporter, "loms.Loms").await;
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

//! Connections to PostgreSQL, each lent to one piece of work with a bound. No backend is ever cancelled or ended by us: a
//! connection whose work came to its bound, or whose caller left, is waited for by a task and comes back when it has its
//! answer. Over deadpool instead of sqlx's pool, which makes connections in callers' futures and throws them away with them.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use deadpool::{
    Runtime,
    managed::{
        self, Metrics as Usage, Object, PoolError, RecycleError, RecycleResult, TimeoutType,
    },
};
use prometheus::{IntGauge, IntGaugeVec, Opts};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Instant,
};

use super::{
    database::{Database, State},
    db::{Db, Origin},
    error::{Error, Failure},
};
use crate::{error::StartError, grpc::registered, tasks};

/// How long a connection whose work has failed may take to show that it is well, while its caller waits.
const CHECK_BOUND: Duration = Duration::from_secs(1);

/// A pool that connects when it must, and again when the database was away; clones share it.
#[derive(Clone)]
pub struct Pool {
    connections: managed::Pool<Connector>,
    maker: Arc<Maker>,
    bound: Duration,
    gauges: Arc<Gauges>,
}

/// A session and its place among those that may exist.
struct Session {
    db: Db,
    /// When it is replaced by a new one, so that what changed on the way to the server is noticed.
    retires: Instant,
    _permit: OwnedSemaphorePermit,
}

/// What makes sessions, in tasks: whoever asked for one may leave.
struct Maker {
    origin: Origin,
    /// One for each session that exists, those that still wait for an answer among them.
    permits: Arc<Semaphore>,
    /// Made for somebody who has left, or come back after its answer.
    spare: Mutex<Vec<Session>>,
}

impl Maker {
    async fn make(&self, permit: OwnedSemaphorePermit) -> Result<Session, Error> {
        let db = self.database().connect(self.origin.clone()).await?;
        let lifetime = self.database().config().max_lifetime;
        // connections made at one moment do not end at one moment
        let lifetime = lifetime.mul_f64(0.9 + rand::random::<f64>() / 10.0);
        Ok(Session {
            db,
            retires: Instant::now() + lifetime,
            _permit: permit,
        })
    }

    fn database(&self) -> &Database {
        &self.origin.database
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Vec<Session>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Connector(Arc<Maker>);

impl managed::Manager for Connector {
    type Type = Session;
    type Error = Error;

    async fn create(&self) -> Result<Session, Error> {
        if let Some(session) = self.0.spare().pop() {
            return Ok(session);
        }
        let permit = self.0.permits.clone().try_acquire_owned().map_err(|_| {
            Error::new(
                Failure::NotConnected,
                "every connection waits for an answer of the server",
            )
        })?;
        let (sender, made) = oneshot::channel();
        let maker = self.0.clone();
        tasks::spawn(async move {
            let made = maker.make(permit).await;
            if let Err(Ok(session)) = sender.send(made) {
                maker.spare().push(session);
            }
        });
        made.await
            .unwrap_or_else(|_| Err(Error::new(Failure::NotConnected, "the process stops")))
    }

    /// Nothing is tested before use, which would cost a round trip a call: what is in the pool was well when it came back.
    async fn recycle(&self, session: &mut Session, _: &Usage) -> RecycleResult<Error> {
        if Instant::now() >= session.retires {
            return Err(RecycleError::message("its time is over"));
        }
        Ok(())
    }
}

impl Pool {
    pub(super) fn new(
        database: Database,
        application: &'static str,
        max: u32,
        permits: u32,
        by_index: bool,
    ) -> Result<Pool, StartError> {
        let config = database.config();
        let (bound, acquire_timeout) = (config.transaction_bound(), config.acquire_timeout);
        let gauges = Gauges::of(database.service(), application);
        let maker = Arc::new(Maker {
            origin: Origin {
                database,
                application,
                by_index,
            },
            permits: Arc::new(Semaphore::new(permits as usize)),
            spare: Mutex::default(),
        });
        let connections = managed::Pool::builder(Connector(maker.clone()))
            .max_size(max as usize)
            .wait_timeout(Some(acquire_timeout))
            .create_timeout(Some(acquire_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StartError::new(format!("preparing a pool: {error}"), "report it"))?;
        Ok(Pool {
            connections,
            maker,
            bound,
            gauges: Arc::new(gauges),
        })
    }

    /// Does work on a connection of its own, for at most [`PostgresConfig::transaction_bound`]: the server's time-outs end
    /// what is slow, this ends the wait for what is silent. A transaction that the work leaves open is rolled back.
    ///
    /// [`PostgresConfig::transaction_bound`]: crate::config::PostgresConfig::transaction_bound
    ///
    /// # Errors
    /// What the work says; no connection within `acquire_timeout`; time ran out, and then what became of a commit is
    /// unknown.
    pub async fn with_connection<T, E: From<Error>>(
        &self,
        work: impl AsyncFnOnce(&mut Db) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut lent = self.lend().await?;
        let db = lent.db()?;
        let whole = async {
            db.start_work().await?;
            let done = work(db).await?;
            db.end_work().await?;
            Ok(done)
        };
        let Ok(done) = tokio::time::timeout(self.bound, whole).await else {
            // dropped, it is waited for
            return Err(Error::silent().into());
        };
        lent.give_back(done.is_err()).await;
        done
    }

    /// [`Pool::with_connection`] for single statements that may be done twice, as all that only read: once more on a new
    /// connection, if the first was broken.
    ///
    /// # Errors
    /// As there.
    pub async fn repeatable<T>(
        &self,
        work: impl AsyncFnOnce(&mut Db) -> sqlx::Result<T> + Clone,
    ) -> Result<T, Error> {
        let first = work.clone();
        let done: Result<T, Error> = self.with_connection(async |db| Ok(first(db).await?)).await;
        match done {
            Err(error) if error.failure() == Failure::Lost && !error.is_silence() => {
                self.with_connection(async |db| Ok(work(db).await?)).await
            }
            done => done,
        }
    }

    async fn lend(&self) -> Result<Lent, Error> {
        let got = {
            let _waiting = Waiting::new(&self.gauges.waiting);
            self.connections.get().await
        };
        let session = got.map_err(|error| match error {
            PoolError::Backend(error) => error,
            PoolError::Timeout(TimeoutType::Wait) => Error::new(
                Failure::Exhausted,
                "every connection is in use for longer than acquire_timeout",
            ),
            PoolError::Closed => Error::new(Failure::NotConnected, "the process stops"),
            other => Error::new(Failure::NotConnected, other.to_string()),
        })?;
        let lent = Lent {
            pool: self.clone(),
            session: Some(session),
        };
        self.gauges.show(&self.connections);
        Ok(lent)
    }

    /// Whatever broke one connection has most likely broken those that rest too: callers should not find out one by one.
    fn distrust(&self) {
        self.connections.retain(|_, _| false);
        self.maker.spare().clear();
    }

    /// Waits in a task for the answer to whatever was asked last, for at most `reap_after`. The session keeps its permit
    /// until then: a server that does not answer is not given more and more connections.
    fn reap(&self, mut session: Session) {
        let (pool, limit) = (self.clone(), self.maker.database().config().reap_after);
        let waiting = Waiting::new(&self.gauges.abandoned);
        tasks::spawn_if_running(async move {
            let settled = tokio::time::timeout(limit, session.db.settle()).await;
            drop(waiting);
            match settled {
                Ok(Ok(true)) => pool.maker.spare().push(session),
                Ok(Ok(false)) => pool.maker.database().note(State::ReadOnly),
                Ok(Err(error)) => tracing::debug!(error = %error, "abandoned connection ended"),
                Err(_) => tracing::warn!(
                    pool = pool.maker.origin.application,
                    "the server has not answered, its connection is given up"
                ),
            }
        });
    }

    /// Lets every connection go that nobody uses, and lends no more.
    pub fn close(&self) {
        self.connections.close();
        self.maker.spare().clear();
    }
}

/// A connection on loan. Dropped before it is given back, its answer is waited for: its caller left in the middle of
/// something.
struct Lent {
    pool: Pool,
    session: Option<Object<Connector>>,
}

impl Lent {
    fn db(&mut self) -> Result<&mut Db, Error> {
        let session = self.session.as_mut();
        session
            .map(|session| &mut session.db)
            .ok_or_else(Error::silent)
    }

    /// Puts it back into the pool if it is well. It is asked only when there is a reason: a failure, or a transaction that
    /// was left open, whose locks would be held until somebody else uses the connection.
    async fn give_back(mut self, failed: bool) {
        let Ok(db) = self.db() else { return };
        let well = if failed || db.is_open() {
            tokio::time::timeout(CHECK_BOUND, db.settle()).await
        } else {
            Ok(Ok(true))
        };
        match well {
            Ok(Ok(true)) => {
                drop(self.session.take());
                self.pool.gauges.show(&self.pool.connections);
            }
            // silent: dropped, it is waited for
            Err(_) => self.pool.distrust(),
            Ok(found) => {
                if let Some(session) = self.session.take() {
                    drop(Object::take(session));
                }
                self.pool.distrust();
                if matches!(found, Ok(false)) {
                    self.pool.maker.database().note(State::ReadOnly);
                }
                self.pool.gauges.show(&self.pool.connections);
            }
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            self.pool.reap(Object::take(session));
            self.pool.gauges.show(&self.pool.connections);
        }
    }
}

/// Counts somebody for as long as it lives; one that leaves in the middle does not wait any more.
struct Waiting(IntGauge);

impl Waiting {
    fn new(gauge: &IntGauge) -> Waiting {
        gauge.inc();
        Waiting(gauge.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What an operator sees of a pool.
struct Gauges {
    in_use: IntGauge,
    idle: IntGauge,
    abandoned: IntGauge,
    waiting: IntGauge,
}

impl Gauges {
    fn of(service: &'static str, application: &str) -> Gauges {
        let (connections, waiting) = families(service);
        Gauges {
            in_use: connections.with_label_values(&[application, "in_use"]),
            idle: connections.with_label_values(&[application, "idle"]),
            abandoned: connections.with_label_values(&[application, "abandoned"]),
            waiting: waiting.with_label_values(&[application]),
        }
    }

    fn show(&self, connections: &managed::Pool<Connector>) {
        let status = connections.status();
        self.idle.set(status.available as i64);
        self.in_use
            .set(status.size.saturating_sub(status.available) as i64);
    }
}

/// One pair of metrics a service, whatever the number of its pools.
fn families(service: &'static str) -> (IntGaugeVec, IntGaugeVec) {
    static KNOWN: LazyLock<Mutex<HashMap<&'static str, (IntGaugeVec, IntGaugeVec)>>> =
        LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let connections = Opts::new(
            format!("{service}_pool_connections"),
            "Connections to PostgreSQL by what they do.",
        );
        let waiting = Opts::new(
            format!("{service}_pool_waiting"),
            "Callers that wait for a connection.",
        );
        (
            registered(IntGaugeVec::new(connections, &["pool", "state"])),
            registered(IntGaugeVec::new(waiting, &["pool"])),
        )
    };
    known.entry(service).or_insert_with(make).clone()
}

#[cfg(test)]
mod tests {
    use sqlx::migrate::Migrator;

    use super::*;
    use crate::config::PostgresConfig;

    static NOTHING: Migrator = Migrator::DEFAULT;

    #[tokio::test]
    async fn a_caller_who_leaves_does_not_wait_any_more() {
        // takes connections and never says a word
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://u:p@{}/d", silent.local_addr().unwrap());
        let config = serde_json::json!({"connection_string": url, "acquire_timeout": "20s"});
        let config: PostgresConfig = serde_json::from_value(config).unwrap();
        let database = Database::new("waiting", &config, &NOTHING).unwrap();
        let pool = database.pool("waiting", 1).unwrap();
        let work = async |_: &mut Db| Ok::<(), Error>(());
        let mut caller = Box::pin(pool.with_connection(work));
        assert!(futures::poll!(&mut caller).is_pending());
        assert_eq!(pool.gauges.waiting.get(), 1);
        drop(caller);
        assert_eq!(pool.gauges.waiting.get(), 0);
    }
}

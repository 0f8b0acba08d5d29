//! Connections to PostgreSQL, each lent to one piece of work with a bound. No backend is ever cancelled or ended by us: a
//! connection whose work came to its bound, or whose caller left, is waited for by a task and comes back when it has its
//! answer, and counts until then. By hand, because pools such as sqlx's and deadpool's make connections in their callers'
//! futures, drop them with those, and know no connection that is neither lent nor free.

use std::{
    borrow::Cow,
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::Instant,
};

use super::{
    database::{Database, State},
    db::{Db, Origin},
    error::{Error, Failure},
    gauges::{Counted, Gauges},
    lent::{Abandoned, Lent, Place, Session},
    queue::{Closed, Permit, Queue, RowBound},
};
use crate::{call::Call, state_log::StateLog, tasks};

/// One in so many connections is used by calls that want the same row.
const ROW_SHARE: u32 = 4;

static GIVEN_UP: StateLog = StateLog::new(
    "the server has not answered, its connection is given up",
    "the server answers again",
);

/// A pool that connects when it must, and again when the database was away; clones share it.
#[derive(Clone)]
pub struct Pool(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) origin: Origin,
    /// One for each connection that may be lent. An abandoned one takes a place too once `extra` is used up.
    places: Arc<Queue>,
    rows: RowBound,
    /// For connections whose answer is still waited for.
    extra: Arc<Semaphore>,
    /// All that may exist.
    most: usize,
    sessions: Mutex<Sessions>,
    /// Connections whose answer is still waited for.
    pub(super) abandoned: AtomicUsize,
    pub(super) gauges: Gauges,
}

/// Connections that are not lent.
#[derive(Default)]
struct Sessions {
    idle: Vec<Session>,
    /// Connections that are being made.
    making: usize,
    /// Callers that wait for one to be made. They get the first that there is: a connection that
    /// comes back is often sooner.
    wanting: VecDeque<oneshot::Sender<Result<Lent, Error>>>,
}

impl Inner {
    async fn connect(&self) -> Result<Session, Error> {
        let database = &self.origin.database;
        let db = database.connect(self.origin.clone()).await?;
        // connections made at one moment do not end at one moment
        let lifetime = database.config().max_lifetime;
        let lifetime = lifetime.mul_f64(0.9 + rand::random::<f64>() / 10.0);
        Ok(Session {
            db,
            retires: Instant::now() + lifetime,
        })
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a connection on to a caller that wants one, or keeps it.
    pub(super) fn offer(&self, mut lent: Lent) {
        let mut sessions = self.sessions();
        while let Some(caller) = sessions.wanting.pop_front() {
            match caller.send(Ok(lent)) {
                Ok(()) => return,
                Err(Ok(refused)) => lent = refused,
                Err(Err(_)) => return,
            }
        }
        let kept = lent.lent.take();
        // a pool that was closed keeps none
        if let Some((session, _place)) = kept
            && !self.places.is_closed()
        {
            sessions.idle.push(session);
            self.gauges.idle.set(sessions.idle.len() as i64);
        }
    }
}

impl Pool {
    /// At most `max` connections are lent, and `extra` more may be waiting for an answer.
    pub(super) fn new(
        database: Database,
        application: Cow<'static, str>,
        max: u32,
        extra: u32,
        by_index: bool,
    ) -> Pool {
        let gauges = Gauges::of(database.service(), &application);
        Pool(Arc::new(Inner {
            origin: Origin {
                database,
                application,
                by_index,
            },
            places: Queue::new(max as usize),
            rows: RowBound::new(max.div_ceil(ROW_SHARE) as usize),
            extra: Arc::new(Semaphore::new(extra as usize)),
            most: (max + extra) as usize,
            sessions: Mutex::default(),
            abandoned: AtomicUsize::new(0),
            gauges,
        }))
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
        let by = self.acquire_by();
        let lent = self.lend(by).await?;
        self.work_on(lent, work).await
    }

    /// [`Pool::with_connection`] for work that first locks one row, such as a user's cart. At most a
    /// quarter of the connections wait for the same `row`.
    ///
    /// # Errors
    /// As there.
    pub async fn with_row<T, E: From<Error>>(
        &self,
        row: i64,
        work: impl AsyncFnOnce(&mut Db) -> Result<T, E>,
    ) -> Result<T, E> {
        let by = self.acquire_by();
        let waiting = Counted::new(&self.0.gauges.waiting);
        let permit = tokio::time::timeout_at(by, self.0.rows.acquire(row)).await;
        let _permit = permit.map_err(|_| {
            let cause = "one row is waited for by a quarter of the connections";
            Error::new(Failure::Exhausted, cause)
        })?;
        drop(waiting);
        let lent = self.lend(by).await?;
        self.work_on(lent, work).await
    }

    fn acquire_by(&self) -> Instant {
        Instant::now() + self.database().config().acquire_timeout
    }

    async fn work_on<T, E: From<Error>>(
        &self,
        mut lent: Lent,
        work: impl AsyncFnOnce(&mut Db) -> Result<T, E>,
    ) -> Result<T, E> {
        let db = lent.db()?;
        let whole = async {
            let done = work(db).await?;
            db.end_work().await?;
            Ok(done)
        };
        let Ok(done) =
            tokio::time::timeout(self.database().config().transaction_bound(), whole).await
        else {
            // dropped, it is waited for. Longer than any time-out of the server: those that rest
            // are silent too
            self.distrust();
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

    async fn lend(&self, by: Instant) -> Result<Lent, Error> {
        let inner = &self.0;
        let _waiting = Counted::new(&inner.gauges.waiting);
        let place = tokio::time::timeout_at(by, inner.places.acquire(Call::peer())).await;
        let place = match place {
            Ok(Ok(place)) => place,
            Ok(Err(Closed)) => return Err(Error::new(Failure::NotConnected, "the process stops")),
            Err(_) if inner.abandoned.load(Ordering::Relaxed) >= inner.most => {
                return Err(Error::new(
                    Failure::NotConnected,
                    "every connection waits for an answer of the server",
                ));
            }
            Err(_) => {
                return Err(Error::new(
                    Failure::Exhausted,
                    "every connection is in use for longer than acquire_timeout",
                ));
            }
        };
        let made = match self.take(place) {
            Ok(lent) => return Ok(lent),
            Err(made) => made,
        };
        match tokio::time::timeout_at(by, made).await {
            Ok(Ok(made)) => made,
            Ok(Err(_)) => Err(Error::new(Failure::NotConnected, "the process stops")),
            Err(_) => {
                let cause = "no connection within acquire_timeout";
                Err(Error::new(Failure::NotConnected, cause))
            }
        }
    }

    /// An idle connection, or one that is to come. Nothing is tested before use, which would cost a
    /// round trip a call: what is idle was well when it came back.
    fn take(&self, place: Permit) -> Result<Lent, oneshot::Receiver<Result<Lent, Error>>> {
        let inner = &self.0;
        let mut sessions = inner.sessions();
        let now = Instant::now();
        sessions.idle.retain(|session| session.retires > now);
        let idle = sessions.idle.pop();
        inner.gauges.idle.set(sessions.idle.len() as i64);
        if let Some(session) = idle {
            return Ok(Lent::new(self, session, Place::Own(place)));
        }
        let (sender, made) = oneshot::channel();
        sessions.wanting.push_back(sender);
        sessions.making += 1;
        tasks::spawn(self.clone().make(place));
        Err(made)
    }

    /// Connects in a task, which has the place. The caller may leave; the connection is kept then.
    async fn make(self, place: Permit) {
        let made = self.0.connect().await;
        let mut sessions = self.0.sessions();
        sessions.making -= 1;
        match made {
            Ok(session) => {
                drop(sessions);
                self.0.offer(Lent::new(&self, session, Place::Own(place)));
            }
            Err(error) => {
                sessions.wanting.retain(|caller| !caller.is_closed());
                // for each of the others a connection is still being made
                if sessions.wanting.len() > sessions.making
                    && let Some(caller) = sessions.wanting.pop_front()
                {
                    let _ = caller.send(Err(error));
                }
            }
        }
    }

    pub(super) fn database(&self) -> &Database {
        &self.0.origin.database
    }

    /// Whatever broke one connection has most likely broken those that rest too: callers should not find out one by one.
    pub(super) fn distrust(&self) {
        self.0.sessions().idle.clear();
        self.0.gauges.idle.set(0);
    }

    /// Waits in a task for the answer to whatever was asked last, for at most `reap_after`. The connection counts until
    /// then: a server that does not answer is not given more and more of them.
    pub(super) fn reap(&self, mut session: Session, mut place: Place) {
        let (pool, limit) = (self.clone(), self.database().config().reap_after);
        let abandoned = Abandoned::new(&self.0);
        // at once, if there is one: a caller may be waiting for the place
        if let (Place::Own(_), Ok(extra)) = (&place, self.0.extra.clone().try_acquire_owned()) {
            place = Place::Extra(extra);
        }
        tasks::spawn_if_running(async move {
            let settled = {
                let mut settled = pin!(tokio::time::timeout(limit, session.db.settle()));
                loop {
                    tokio::select! {
                        biased;
                        settled = &mut settled => break settled,
                        Ok(extra) = pool.0.extra.clone().acquire_owned(),
                            if matches!(place, Place::Own(_)) => place = Place::Extra(extra),
                    }
                }
            };
            drop(abandoned);
            match settled {
                Ok(Ok(true)) => pool.0.offer(Lent::new(&pool, session, place)),
                Ok(Ok(false)) => pool.database().note(State::ReadOnly),
                Ok(Err(error)) => tracing::debug!(error = %error, "abandoned connection ended"),
                Err(_) => GIVEN_UP.failed(&pool.0.origin.application),
            }
        });
    }

    /// Lets every connection go that nobody uses, and lends no more.
    pub fn close(&self) {
        self.0.places.close();
        self.distrust();
    }
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
        let pool = database.pool("waiting", 1);
        let work = async |_: &mut Db| Ok::<(), Error>(());
        let mut caller = Box::pin(pool.with_connection(work));
        assert!(futures::poll!(&mut caller).is_pending());
        assert_eq!(pool.0.gauges.waiting.get(), 1);
        drop(caller);
        assert_eq!(pool.0.gauges.waiting.get(), 0);
    }
}

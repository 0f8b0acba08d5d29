//! The connections that callers share. Work is done in rounds, each with a bound: a connection goes back only when it is
//! known to be well, so that neither a caller who leaves in the middle nor a server that has gone silent uses the pool up.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use deadpool::{
    Runtime,
    managed::{self, Metrics as Usage, Object, PoolError, RecycleResult},
};
use prometheus::{IntGauge, IntGaugeVec, Opts};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, postgres::PgConnectOptions};

use crate::{
    config::PostgresConfig,
    error::StartError,
    grpc::registered,
    pg::{connect_options, silent},
};

/// How long a connection whose work has failed may take to show that it is well.
const CHECK_BOUND: Duration = Duration::from_secs(1);

/// A pool that connects when it must, and again when the database was away; clones share it.
#[derive(Clone)]
pub struct Pool {
    connections: managed::Pool<Connector>,
    bound: Duration,
    gauges: Arc<Gauges>,
}

/// Makes connections. Nothing is tested before use, which would cost a round trip a call: what is in the pool was well
/// when it came back.
struct Connector(PgConnectOptions);

impl managed::Manager for Connector {
    type Type = PgConnection;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<PgConnection, sqlx::Error> {
        self.0.connect().await
    }

    async fn recycle(&self, _: &mut PgConnection, _: &Usage) -> RecycleResult<sqlx::Error> {
        Ok(())
    }
}

impl Pool {
    /// A pool of at most `max` connections that PostgreSQL knows as `application`, `<service>` or `<service>-<use>`.
    ///
    /// # Errors
    /// A connection string that is none.
    pub fn new(config: &PostgresConfig, application: &str, max: u32) -> Result<Pool, StartError> {
        let connector = Connector(connect_options(config, application)?);
        let connections = managed::Pool::builder(connector)
            .max_size(max.max(1) as usize)
            .wait_timeout(Some(config.acquire_timeout))
            .create_timeout(Some(config.acquire_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StartError::new(format!("preparing a pool: {error}"), "report it"))?;
        Ok(Pool {
            connections,
            bound: config.transaction_bound(),
            gauges: Arc::new(Gauges::of(application)),
        })
    }

    /// Does a round of work on a connection of its own, for at most [`PostgresConfig::transaction_bound`]: the server's
    /// time-outs end what is slow, this ends what is silent. A transaction that the work leaves open is rolled back.
    ///
    /// # Errors
    /// What the work says; no connection within `acquire_timeout`; time ran out, and then what became of a commit is
    /// unknown.
    pub async fn round<T, E: From<sqlx::Error>>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut lent = self.lend().await?;
        let done = tokio::time::timeout(self.bound, work(lent.connection()?)).await;
        let done = done.map_err(|_| silent())?;
        lent.give_back(done.is_err()).await;
        done
    }

    async fn lend(&self) -> Result<Lent, sqlx::Error> {
        let got = {
            let _waiting = Waiting::new(&self.gauges.waiting);
            self.connections.get().await
        };
        let connection = got.map_err(|error| match error {
            PoolError::Backend(error) => error,
            PoolError::Closed => sqlx::Error::PoolClosed,
            _ => sqlx::Error::PoolTimedOut,
        })?;
        let lent = Lent {
            pool: self.clone(),
            connection: Some(connection),
        };
        self.gauges.show(&self.connections);
        Ok(lent)
    }

    /// Lets every connection go that nobody uses, and lends no more.
    pub fn close(&self) {
        self.connections.close();
    }
}

/// A connection on loan. Dropped before it is given back, it is closed: its caller left in the middle of something.
struct Lent {
    pool: Pool,
    connection: Option<Object<Connector>>,
}

impl Lent {
    fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.connection.as_deref_mut().ok_or_else(silent)
    }

    /// Puts it back into the pool if it is well. It is asked only when there is a reason: a failure, or a rollback that
    /// still has to be sent, whose locks would be held until somebody else uses the connection.
    async fn give_back(mut self, failed: bool) {
        let well = match self.connection() {
            Ok(connection) if failed || connection.should_flush() => {
                let asked = tokio::time::timeout(CHECK_BOUND, connection.ping()).await;
                matches!(asked, Ok(Ok(())))
            }
            Ok(_) => true,
            Err(_) => false,
        };
        if well {
            drop(self.connection.take());
            self.pool.gauges.show(&self.pool.connections);
        } else {
            // whatever broke this one has most likely broken those that rest too: callers should not find out one by one
            self.pool.connections.retain(|_, _| false);
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(Object::take(connection));
            self.pool.gauges.show(&self.pool.connections);
        }
    }
}

/// A caller that waits; one that leaves in the middle does not wait any more.
struct Waiting<'a>(&'a IntGauge);

impl Waiting<'_> {
    fn new(gauge: &IntGauge) -> Waiting<'_> {
        gauge.inc();
        Waiting(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What an operator sees of a pool.
struct Gauges {
    in_use: IntGauge,
    idle: IntGauge,
    waiting: IntGauge,
}

impl Gauges {
    fn of(application: &str) -> Gauges {
        let service = application.split('-').next().unwrap_or(application);
        let (connections, waiting) = families(service);
        Gauges {
            in_use: connections.with_label_values(&[application, "in_use"]),
            idle: connections.with_label_values(&[application, "idle"]),
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
fn families(service: &str) -> (IntGaugeVec, IntGaugeVec) {
    static KNOWN: LazyLock<Mutex<HashMap<String, (IntGaugeVec, IntGaugeVec)>>> =
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
    known.entry(service.to_owned()).or_insert_with(make).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_who_leaves_does_not_wait_any_more() {
        // takes connections and never says a word
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://u:p@{}/d", silent.local_addr().unwrap());
        let config = serde_json::json!({"connection_string": url, "acquire_timeout": "20s"});
        let config: PostgresConfig = serde_json::from_value(config).unwrap();
        let pool = Pool::new(&config, "waiting", 1).unwrap();
        let work = async |_: &mut PgConnection| Ok::<(), sqlx::Error>(());
        let mut caller = Box::pin(pool.round(work));
        assert!(futures::poll!(&mut caller).is_pending());
        assert_eq!(pool.gauges.waiting.get(), 1);
        drop(caller);
        assert_eq!(pool.gauges.waiting.get(), 0);
    }
}

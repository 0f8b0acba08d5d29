//! PostgreSQL: connections whose every wait has a bound, migrations, and what an error means for the one who must react.

use std::{str::FromStr as _, time::Duration};

use secrecy::ExposeSecret as _;
use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection, migrate::Migrator,
    postgres::PgConnectOptions,
};

use crate::{config::PostgresConfig, error::StartError};

pub(crate) fn connect_options(
    config: &PostgresConfig,
    application: &str,
) -> Result<PgConnectOptions, StartError> {
    let options =
        PgConnectOptions::from_str(config.connection_string.expose_secret()).map_err(|error| {
            // the error, not the string: it holds a password
            StartError::new(
                format!("postgres.connection_string: {error}"),
                "write it as postgres://user:password@host:port/database",
            )
        })?;
    Ok(options
        .application_name(application)
        .statement_cache_capacity(config.statement_cache)
        .log_statements(tracing::log::LevelFilter::Off)
        // a busy disk makes every statement slow: a line for each would be the storm, latency is a metric
        .log_slow_statements(tracing::log::LevelFilter::Debug, Duration::from_secs(1))
        .options([
            ("lock_timeout", millis(config.lock_timeout)),
            ("statement_timeout", millis(config.statement_timeout)),
            (
                "idle_in_transaction_session_timeout",
                millis(config.idle_in_transaction_timeout),
            ),
            // a client that vanished without a word is noticed within half a minute
            ("tcp_keepalives_idle", "15".into()),
            ("tcp_keepalives_interval", "5".into()),
            ("tcp_keepalives_count", "3".into()),
        ]))
}

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

/// Applies what is not applied yet, over one direct connection.
///
/// # Errors
/// No connection, or a migration that fails.
pub async fn migrate(config: &PostgresConfig, migrator: &Migrator) -> Result<(), StartError> {
    // a migration may rewrite a table: its statements have no bound, waiting for a lock does
    let unbounded = PostgresConfig {
        statement_timeout: Duration::ZERO,
        ..config.clone()
    };
    let options = connect_options(&unbounded, "migrate")?;
    let server = format!("{}:{}", options.get_host(), options.get_port());
    let mut connection = connect(&options).await?;
    migrator.run(&mut connection).await.map_err(|error| {
        StartError::new(
            format!("migrating {server}: {error}"),
            "the schema is as it was before this migration",
        )
    })
}

/// Connects once, so that a wrong address, name or password shows at the start and not in the first call.
///
/// # Errors
/// What PostgreSQL, or the network, said.
pub async fn check(config: &PostgresConfig) -> Result<(), StartError> {
    let connection = connect_as(config, "start").await?;
    // a server that has let us in will notice by itself if this good-bye is lost
    connection.close().await.ok();
    Ok(())
}

/// One connection, for a command that does one thing.
///
/// # Errors
/// What PostgreSQL, or the network, said.
pub async fn connect_as(
    config: &PostgresConfig,
    application: &str,
) -> Result<PgConnection, StartError> {
    connect(&connect_options(config, application)?).await
}

/// A name that resolves slowly and a server that is starting get this long.
const CONNECT_BOUND: Duration = Duration::from_secs(10);

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, StartError> {
    let cause = match tokio::time::timeout(CONNECT_BOUND, options.connect()).await {
        Ok(Ok(connection)) => return Ok(connection),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {CONNECT_BOUND:?}"),
    };
    let server = format!("{}:{}", options.get_host(), options.get_port());
    Err(StartError::new(
        format!("connecting to PostgreSQL at {server}: {cause}"),
        "start it, or correct postgres.connection_string",
    ))
}

/// What a worker reads it reads by key, and its statements are planned once. Planned while the tables are small, they would
/// read them whole, and go on so when they have grown: until PostgreSQL analyzes a table, which takes it a minute or more.
const BY_INDEX: [(&str, &str); 4] = [
    ("enable_seqscan", "off"),
    // it would fetch and sort all that is due before it returned the first row
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// A worker's own connection: callers that use up the pool cannot stop the worker. It is made when it is needed, kept
/// between rounds, and closed when a round fails or takes too long, so that nothing waits for a server that has gone silent.
pub struct OwnConnection {
    options: PgConnectOptions,
    connect_bound: Duration,
    open: Option<PgConnection>,
}

impl OwnConnection {
    /// # Errors
    /// A connection string that is none.
    pub fn new(config: &PostgresConfig, application: &str) -> Result<Self, StartError> {
        Ok(OwnConnection {
            options: connect_options(config, application)?.options(BY_INDEX),
            connect_bound: config.acquire_timeout,
            open: None,
        })
    }

    /// Does a round of work, for at most `bound`: the server's time-outs end what is slow, this ends what is silent.
    ///
    /// # Errors
    /// What the work says, or that time ran out; what became of a commit is unknown then.
    pub async fn round<T, E: From<sqlx::Error>>(
        &mut self,
        bound: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = match self.open.take() {
            Some(connection) => connection,
            None => tokio::time::timeout(self.connect_bound, self.options.connect())
                .await
                .map_err(|_| silent())??,
        };
        let done = tokio::time::timeout(bound, work(&mut connection)).await;
        let done = done.map_err(|_| silent())??;
        self.open = Some(connection);
        Ok(done)
    }
}

/// What a caller hears of a server that said nothing in its time.
pub(crate) fn silent() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Whether every migration of this binary has been applied; later ones are fine, so that releases can overlap.
///
/// # Errors
/// The database is away, or has no schema at all.
pub async fn schema_is_current(
    db: &mut PgConnection,
    migrator: &Migrator,
) -> Result<bool, sqlx::Error> {
    let wanted = migrator
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0);
    let statement = format!(
        "SELECT coalesce(max(version), 0) FROM {} WHERE success",
        migrator.table_name
    );
    let applied: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(statement))
        .fetch_one(db)
        .await?;
    Ok(applied >= wanted)
}

/// What a database error means for the one who must react.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// PostgreSQL refused a value or a constraint was hurt (SQLSTATE 22, 23): the same data fails again.
    Data,
    /// A deadlock or a serialization failure (40P01, 40001): nothing was written, the same again may pass.
    Retry,
    /// No connection, a time-out, a server that stops: what became of a commit is unknown.
    Away,
    /// Anything else: a bug of ours.
    Bug,
}

/// Sorts an error by what can be done about it.
pub fn classify(error: &sqlx::Error) -> Failure {
    match error {
        sqlx::Error::Database(database) => match database.code().as_deref().unwrap_or_default() {
            "40001" | "40P01" => Failure::Retry,
            // lock_not_available and query_canceled: our own bounds
            "55P03" => Failure::Away,
            code if code.starts_with("22") || code.starts_with("23") => Failure::Data,
            code if ["08", "53", "57", "58", "25P03"]
                .iter()
                .any(|class| code.starts_with(class)) =>
            {
                Failure::Away
            }
            _ => Failure::Bug,
        },
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Failure::Away,
        _ => Failure::Bug,
    }
}

/// The name of the constraint that was hurt.
pub fn constraint(error: &sqlx::Error) -> Option<&str> {
    error
        .as_database_error()
        .and_then(|database| database.constraint())
}

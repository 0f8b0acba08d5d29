//! The database of a process: how to connect to it, and what is known of it. Connections are made by tasks, one attempt
//! after another with a growing pause while it is away, and only from a server that takes writes and has the schema.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use sqlx::{ConnectOptions as _, migrate::Migrator, postgres::PgConnectOptions};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    db::{Db, Origin},
    error::{self, Error, Failure},
    options::connect_options,
    pool::Pool,
    schema_version,
};
use crate::{
    config::{Pooler, PostgresConfig},
    error::StartError,
    import::{self, Found, Original},
    state_log,
};

/// What a worker reads it reads by key, and its statements are planned once. Planned while the tables are small, they would
/// read them whole, and go on so when they have grown: until PostgreSQL analyzes a table, which takes it a minute or more.
const BY_INDEX: [(&str, &str); 4] = [
    ("enable_seqscan", "off"),
    // it would fetch and sort all that is due before it returned the first row
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// Between attempts to connect: short enough that a server that is back is used at once, long enough not to keep it busy.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(400);
/// How long a start asks whether something is to be imported: a database that is away is no reason
/// not to start.
const ASKED_AT_START: Duration = Duration::from_secs(1);

/// What is known of the database; readiness follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Ok,
    /// No connection; why, in the server's or the network's words, for the log.
    Away(String),
    ReadOnly,
    SchemaMissing,
    SchemaBehind,
    /// An import has begun and is not done.
    Importing,
    /// What the system before left is there, and nobody has said what is to become of it.
    Unsettled,
}

impl State {
    /// What `/readyz` says: nothing of addresses or names.
    pub fn report(&self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Away(_) => "away",
            State::ReadOnly => "read-only",
            State::SchemaMissing => "schema is missing: run migrate",
            State::SchemaBehind => "schema is behind: run migrate",
            State::Importing => "an import is not done: run import",
            State::Unsettled => "the data of the system before is not taken over: run import",
        }
    }
}

/// A handle; clones share what is known.
#[derive(Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    service: &'static str,
    options: PgConnectOptions,
    config: PostgresConfig,
    /// What the schema must have; a command that does without asks for nothing.
    migrator: Option<&'static Migrator>,
    /// What must have been imported, or declined.
    original: OnceLock<&'static Original>,
    trouble: Mutex<Trouble>,
    stopping: CancellationToken,
}

struct Trouble {
    state: State,
    pauses: <ExponentialBuilder as backon::BackoffBuilder>::Backoff,
    next_attempt: Instant,
}

fn pauses() -> <ExponentialBuilder as backon::BackoffBuilder>::Backoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

impl Database {
    /// Nothing is connected yet.
    ///
    /// # Errors
    /// A connection string that is none, or a file that it names and that cannot be read.
    pub fn new(
        service: &'static str,
        config: &PostgresConfig,
        migrator: &'static Migrator,
    ) -> Result<Database, StartError> {
        Self::make(service, config, Some(migrator))
    }

    /// For a command that says by itself what the schema lacks, and whether a standby will do.
    ///
    /// # Errors
    /// As [`Database::new`].
    pub fn of_any_schema(
        service: &'static str,
        config: &PostgresConfig,
    ) -> Result<Database, StartError> {
        Self::make(service, config, None)
    }

    fn make(
        service: &'static str,
        config: &PostgresConfig,
        migrator: Option<&'static Migrator>,
    ) -> Result<Database, StartError> {
        error::show_metrics(service);
        let trouble = Trouble {
            state: State::Away("no attempt yet".to_owned()),
            pauses: pauses(),
            next_attempt: Instant::now(),
        };
        Ok(Database(Arc::new(Inner {
            service,
            options: connect_options(config)?,
            config: config.clone(),
            migrator,
            original: OnceLock::new(),
            trouble: Mutex::new(trouble),
            stopping: CancellationToken::new(),
        })))
    }

    /// From now on no connection is made to a database that holds what the system before left,
    /// until it is imported or declined. One that can be asked at once is.
    ///
    /// # Errors
    /// One line that names the command to be run.
    pub async fn expect_settled(&self, original: &'static Original) -> Result<(), StartError> {
        self.0.original.set(original).ok();
        let asked = async {
            let options = self.0.options.clone().application_name(self.service());
            let mut connection = options.connect().await?;
            import::look(&mut connection, original).await
        };
        match tokio::time::timeout(ASKED_AT_START, asked).await {
            Ok(Ok(found)) => found.refuse(original),
            // it is away, as connections will find
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }

    /// The connections that callers share: at most `max` in use, known to PostgreSQL as `application`. A quarter more may
    /// be waiting for an answer that nobody waits for any more.
    pub fn pool(&self, application: &'static str, max: u32) -> Pool {
        let max = max.max(1);
        Pool::new(
            self.clone(),
            application.into(),
            max,
            max.div_ceil(4),
            false,
        )
    }

    /// What readiness asks over. It counts apart from the callers' connections: those say nothing
    /// about the database.
    pub(crate) fn for_readiness(&self) -> Pool {
        let application = format!("{}-readiness", self.service());
        Pool::new(self.clone(), application.into(), 1, 1, false)
    }

    /// A worker's own connection, and one more that may be waiting for an answer: callers that use up theirs cannot stop the
    /// worker.
    pub fn worker(&self, application: &'static str) -> Pool {
        Pool::new(self.clone(), application.into(), 1, 1, true)
    }

    /// One connection, for a command that does one thing.
    ///
    /// # Errors
    /// [`Failure::NotConnected`] or [`Failure::ReadOnly`].
    pub async fn connect_as(&self, application: &'static str) -> Result<Db, Error> {
        let origin = Origin {
            database: self.clone(),
            application: application.into(),
            by_index: false,
        };
        self.connect(origin).await
    }

    pub(crate) fn service(&self) -> &'static str {
        self.0.service
    }

    pub(super) fn config(&self) -> &PostgresConfig {
        &self.0.config
    }

    /// Connects, after the pause that the attempts before demand.
    ///
    /// # Errors
    /// [`Failure::NotConnected`] or [`Failure::ReadOnly`].
    pub(super) async fn connect(&self, origin: Origin) -> Result<Db, Error> {
        let next = self.trouble().next_attempt;
        tokio::time::sleep_until(next).await;
        let bound = self.0.config.acquire_timeout;
        let made = tokio::select! {
            made = tokio::time::timeout(bound, self.try_connect(origin)) => made,
            () = self.nobody_waits() => {
                return Err(Error::new(Failure::NotConnected, "the process stops"));
            }
        };
        let made = made.unwrap_or_else(|_| {
            Err((
                State::Away(format!("no answer within {bound:?}")),
                Failure::NotConnected,
            ))
        });
        match made {
            Ok(db) => {
                self.note(State::Ok);
                Ok(db)
            }
            Err((state, failure)) => {
                let error = Error::new(failure, describe(&state));
                self.note(state);
                Err(error)
            }
        }
    }

    async fn try_connect(&self, origin: Origin) -> Result<Db, (State, Failure)> {
        let away = |error: sqlx::Error| (State::Away(error.to_string()), Failure::NotConnected);
        let config = &self.0.config;
        let options = self.0.options.clone().application_name(&origin.application);
        let mut connection = options.connect().await.map_err(away)?;
        let settings = settings(config, origin.by_index);
        let local = if config.pooler == Pooler::Transaction {
            let mut local = String::new();
            for (name, value) in &settings {
                let _ = write!(local, " SET LOCAL {name} = '{value}';");
            }
            Some(local.into())
        } else {
            let mut own = String::from("SELECT ");
            for (name, value) in settings.iter().chain(&keepalive()) {
                let _ = write!(own, "set_config('{name}', '{value}', FALSE),");
            }
            own.pop();
            let own = sqlx::raw_sql(sqlx::AssertSqlSafe(own));
            own.execute(&mut connection).await.map_err(away)?;
            None
        };
        let named = config.pooler != Pooler::Transaction && config.statement_cache > 0;
        let mut db = Db::new(connection, named, local, origin);
        match self.look(&mut db).await.map_err(away)? {
            State::Ok => Ok(db),
            State::ReadOnly => Err((State::ReadOnly, Failure::ReadOnly)),
            other => Err((other, Failure::NotConnected)),
        }
    }

    /// Asks over `db` what readiness wants to know.
    ///
    /// # Errors
    /// The connection is lost.
    pub(crate) async fn look(&self, db: &mut Db) -> sqlx::Result<State> {
        let Some(migrator) = self.0.migrator else {
            return Ok(State::Ok);
        };
        if !db.is_writable().await? {
            return Ok(State::ReadOnly);
        }
        match schema_version(db, migrator).await {
            Ok(applied) if applied >= super::newest(migrator) => self.look_for_import(db).await,
            Ok(_) => Ok(State::SchemaBehind),
            // undefined_table, undefined_schema, and a schema that somebody else may see
            Err(sqlx::Error::Database(error))
                if matches!(error.code().as_deref(), Some("42P01" | "3F000" | "42501")) =>
            {
                Ok(State::SchemaMissing)
            }
            Err(error) => Err(error),
        }
    }

    async fn look_for_import(&self, db: &mut Db) -> sqlx::Result<State> {
        let Some(original) = self.0.original.get() else {
            return Ok(State::Ok);
        };
        Ok(match import::look(db, original).await? {
            Found::Settled => State::Ok,
            Found::Running => State::Importing,
            Found::Waiting(_) => State::Unsettled,
        })
    }

    /// Takes over what an attempt or a look has found; one line in the log for as long as it lasts.
    pub(crate) fn note(&self, found: State) {
        let mut trouble = self.trouble();
        if found == State::Ok {
            trouble.pauses = pauses();
            trouble.next_attempt = Instant::now();
            state_log::DATABASE.works();
        } else {
            let pause = trouble.pauses.next().unwrap_or(LONGEST_PAUSE);
            trouble.next_attempt = Instant::now() + pause;
            state_log::DATABASE.failed(&describe(&found));
        }
        trouble.state = found;
    }

    /// From now on a database that is away is not waited for: what is left to do is done over
    /// connections that are there.
    pub(crate) fn stop(&self) {
        self.0.stopping.cancel();
    }

    async fn nobody_waits(&self) {
        self.0.stopping.cancelled().await;
        if self.state() == State::Ok {
            std::future::pending().await
        }
    }

    /// What the last attempt or look has found.
    pub(crate) fn state(&self) -> State {
        self.trouble().state.clone()
    }

    fn trouble(&self) -> std::sync::MutexGuard<'_, Trouble> {
        self.0
            .trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn describe(state: &State) -> String {
    match state {
        State::Away(cause) => cause.clone(),
        other => other.report().to_owned(),
    }
}

/// Every bound of a wait inside the server, and how a worker's statements are planned.
fn settings(config: &PostgresConfig, by_index: bool) -> Vec<(&'static str, String)> {
    let millis = |duration: Duration| duration.as_millis().to_string();
    let mut settings = vec![
        ("lock_timeout", millis(config.lock_timeout)),
        ("statement_timeout", millis(config.statement_timeout)),
        (
            "idle_in_transaction_session_timeout",
            millis(config.idle_in_transaction_timeout),
        ),
    ];
    if by_index {
        settings.extend(BY_INDEX.map(|(name, value)| (name, value.to_owned())));
    }
    settings
}

/// A client that vanished without a word is noticed within half a minute.
fn keepalive() -> [(&'static str, String); 3] {
    [
        ("tcp_keepalives_idle", "15".to_owned()),
        ("tcp_keepalives_interval", "5".to_owned()),
        ("tcp_keepalives_count", "3".to_owned()),
    ]
}

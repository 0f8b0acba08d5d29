//! A connection as stores and use cases have it, and the transaction begun on it. sqlx's own types would do but for three
//! things: behind a transaction pooler statements have no name and settings are local to a transaction, and a BEGIN that
//! fails is told from everything that fails after it.

use std::{
    borrow::Cow,
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use futures::{TryFutureExt as _, future::BoxFuture, stream::BoxStream};
use sqlx::{
    AssertSqlSafe, Describe, Either, Execute, Executor, PgConnection, Postgres, Row as _, SqlStr,
    error::BoxDynError,
    postgres::{PgArguments, PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};

use super::{
    database::Database,
    error::{Error, Failure},
};
use crate::tasks;

/// One session of PostgreSQL.
pub struct Db {
    connection: PgConnection,
    /// Whether prepared statements get names, which stay with the session.
    named: bool,
    /// `SET LOCAL` statements that go with each BEGIN, where nothing may be set on the session.
    local: Option<Arc<str>>,
    transaction: Transaction,
    /// How to get another, should this one be found broken.
    origin: Origin,
}

/// What was begun and neither committed nor rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transaction {
    None,
    /// By a statement outside of any. It is two messages with a pause between them; behind a
    /// transaction pooler they reach the same server only inside a transaction.
    Implicit,
    Explicit,
}

/// What a connection was made of.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) database: Database,
    pub(super) application: Cow<'static, str>,
    pub(super) by_index: bool,
}

impl Origin {
    /// Connects in a task: whoever asked for it may leave.
    pub(super) async fn connect(&self) -> Result<Db, Error> {
        let origin = self.clone();
        let made = tasks::spawn(async move { origin.database.clone().connect(origin).await });
        made.await
            .unwrap_or_else(|_| Err(Error::new(Failure::NotConnected, "the process stops")))
    }
}

impl fmt::Debug for Db {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Db")
            .field("transaction", &self.transaction)
            .finish_non_exhaustive()
    }
}

impl Db {
    pub(super) fn new(
        connection: PgConnection,
        named: bool,
        local: Option<Arc<str>>,
        origin: Origin,
    ) -> Db {
        Db {
            connection,
            named,
            local,
            transaction: Transaction::None,
            origin,
        }
    }

    /// Commits what single statements have done behind a transaction pooler.
    ///
    /// # Errors
    /// What became of it is unknown if the connection was lost.
    pub(super) async fn end_work(&mut self) -> Result<(), Error> {
        if self.transaction == Transaction::Implicit {
            self.connection.execute("COMMIT").await?;
            self.transaction = Transaction::None;
        }
        Ok(())
    }

    /// Before a single statement.
    async fn begin_implicit(&mut self) -> sqlx::Result<()> {
        if let Some(local) = &self.local
            && self.transaction == Transaction::None
        {
            self.transaction = Transaction::Implicit;
            let sql = AssertSqlSafe(format!("BEGIN;{local}"));
            self.connection.execute(sql).await?;
        }
        Ok(())
    }

    /// Begins a transaction, READ COMMITTED.
    ///
    /// # Errors
    /// [`Failure::NotConnected`]: nothing was written.
    pub async fn begin(&mut self) -> Result<Tx<'_>, Error> {
        self.begin_with("BEGIN").await
    }

    /// Begins a transaction by `statement`, a BEGIN with its modes. A connection that is found broken is replaced, once: a
    /// BEGIN that fails proves that nothing was written.
    ///
    /// # Errors
    /// As [`Db::begin`].
    pub async fn begin_with(&mut self, statement: &str) -> Result<Tx<'_>, Error> {
        self.end_work().await?;
        if let Err(error) = self.try_begin(statement).await {
            if error.failure() != Failure::NotConnected {
                return Err(error);
            }
            *self = self.origin.connect().await?;
            self.try_begin(statement).await?;
        }
        Ok(Tx { db: self })
    }

    async fn try_begin(&mut self, statement: &str) -> Result<(), Error> {
        // a transaction that was dropped in the middle still holds its locks
        let first = if self.is_open() { "ROLLBACK; " } else { "" };
        let local = self.local.as_deref().unwrap_or_default();
        let sql = format!("{first}{statement};{local}");
        self.transaction = Transaction::Explicit;
        let begun = self.connection.execute(AssertSqlSafe(sql)).await;
        begun.map(drop).map_err(Error::at_begin)
    }

    pub(super) fn is_open(&self) -> bool {
        self.transaction != Transaction::None
    }

    /// Waits for the answers that are still to come, and ends a transaction that was left open. `false`: the session is at
    /// rest, and the server takes no writes any more.
    ///
    /// # Errors
    /// The connection is lost.
    pub(super) async fn settle(&mut self) -> sqlx::Result<bool> {
        for _ in 0..ANSWERS {
            match self.look().await {
                Ok(found) if found.in_transaction => self.roll_back().await?,
                Ok(found) => return Ok(found.writable),
                // of a transaction that has failed: only its end is taken
                Err(error) if state(&error) == "25P02" => self.roll_back().await?,
                // the answer to what was asked before
                Err(sqlx::Error::Database(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn roll_back(&mut self) -> sqlx::Result<()> {
        self.connection.execute("ROLLBACK").await?;
        self.transaction = Transaction::None;
        Ok(())
    }

    /// Ends a transaction that was left open and asks the server how it is, in one round trip.
    async fn look(&mut self) -> sqlx::Result<Found> {
        let first = if self.is_open() { "ROLLBACK; " } else { "" };
        let sql = AssertSqlSafe(format!("{first}{LOOK}"));
        let row = sqlx::raw_sql(sql).fetch_one(&mut self.connection).await?;
        self.transaction = Transaction::None;
        Ok(Found {
            writable: row.try_get("writable")?,
            in_transaction: row.try_get("in_transaction")?,
        })
    }

    /// Whether the server takes writes.
    ///
    /// # Errors
    /// The connection is lost.
    pub(super) async fn is_writable(&mut self) -> sqlx::Result<bool> {
        Ok(self.look().await?.writable)
    }
}

/// Whether the server takes writes, and whether the session is in a transaction that it should not
/// be in.
const LOOK: &str = "SELECT current_setting('transaction_read_only') = 'off' AND NOT pg_is_in_recovery() AS writable,
     now() <> statement_timestamp() AS in_transaction";

/// The most answers that can be outstanding on a session: a statement's, that of its end, and that of a rollback.
const ANSWERS: usize = 6;

struct Found {
    writable: bool,
    in_transaction: bool,
}

fn state(error: &sqlx::Error) -> String {
    let code = error.as_database_error().and_then(|error| error.code());
    code.unwrap_or_default().into_owned()
}

/// A transaction. Dropped before [`Tx::commit`], it is rolled back before the session is used again.
#[derive(Debug)]
pub struct Tx<'a> {
    db: &'a mut Db,
}

impl Tx<'_> {
    /// # Errors
    /// What became of it is unknown if the connection was lost.
    pub async fn commit(self) -> Result<(), Error> {
        self.db.connection.execute("COMMIT").await?;
        self.db.transaction = Transaction::None;
        Ok(())
    }

    /// # Errors
    /// The connection is lost; the server rolls back by itself then.
    pub async fn rollback(self) -> Result<(), Error> {
        Ok(self.db.roll_back().await?)
    }
}

impl Deref for Tx<'_> {
    type Target = Db;

    fn deref(&self) -> &Db {
        self.db
    }
}

impl DerefMut for Tx<'_> {
    fn deref_mut(&mut self) -> &mut Db {
        self.db
    }
}

/// A statement that gets a name only if both it and the session want one.
struct Naming<E> {
    statement: E,
    arguments: Option<Result<Option<PgArguments>, BoxDynError>>,
    named: bool,
}

impl<E> Naming<E> {
    fn new<'q>(mut statement: E, named: bool) -> Naming<E>
    where
        E: Execute<'q, Postgres>,
    {
        Naming {
            arguments: Some(statement.take_arguments()),
            statement,
            named,
        }
    }

    /// Whether it goes to the server in one message: it has no parameters to be bound.
    fn is_simple(&self) -> bool {
        matches!(self.arguments, Some(Ok(None)))
    }
}

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for Naming<E> {
    fn sql(self) -> SqlStr {
        self.statement.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        self.statement.statement()
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, BoxDynError> {
        self.arguments.take().unwrap_or(Ok(None))
    }

    fn persistent(&self) -> bool {
        self.named && self.statement.persistent()
    }
}

impl<'c> Executor<'c> for &'c mut Db {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxStream<'e, sqlx::Result<Either<PgQueryResult, PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let statement = Naming::new(query, self.named);
        let rows = async move {
            if !statement.is_simple() {
                self.begin_implicit().await?;
            }
            Ok(self.connection.fetch_many(statement))
        };
        Box::pin(rows.try_flatten_stream())
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let statement = Naming::new(query, self.named);
        Box::pin(async move {
            if !statement.is_simple() {
                self.begin_implicit().await?;
            }
            self.connection.fetch_optional(statement).await
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        self.connection.prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        self.connection.describe(sql)
    }
}

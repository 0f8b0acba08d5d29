//! The database of the system before, as an import reads it: whether it is the one that is meant,
//! whether anybody else works on it, and whether it is still what it was.

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use anyhow::Context as _;
use sqlx::AssertSqlSafe;
use tokio::time::Instant;

use super::{ImportArgs, Original};
use crate::{
    config::PostgresConfig,
    error::StartError,
    pg::{self, Db, Tx},
};

/// "import" in ASCII: the advisory lock of the session that writes. One import at a time; and by it
/// the session is known among those that are connected to the source, which may be the same
/// database.
pub(super) const LOCK: i64 = 0x696d_706f_7274;

/// A session that has just ended is still listed for a moment.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(100);

/// One moment for all that a slice reads; readers block nobody.
const BEGIN_SNAPSHOT: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// The database that is read.
pub struct Source {
    db: Db,
    name: String,
    zone: String,
    slice: i64,
    /// The type of every column, by table and name.
    types: HashMap<(String, String), String>,
}

impl Source {
    /// Connects and finds the tables, with the columns that they must have.
    pub(super) async fn open(
        config: &PostgresConfig,
        original: &Original,
        args: &ImportArgs,
    ) -> anyhow::Result<Source> {
        let mut db = pg::connect_as(config, "import").await?;
        let name = sqlx::query_scalar("SELECT current_database()::text");
        let name = name.fetch_one(&mut db).await?;
        let types = "SELECT c.relname::text, a.attname::text, format_type(a.atttypid, NULL)
             FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
             WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')";
        let types: Vec<(String, String, String)> = sqlx::query_as(types).fetch_all(&mut db).await?;
        let types = types
            .into_iter()
            .map(|(table, column, kind)| ((table, column), kind));
        let source = Source {
            db,
            name,
            zone: args.time_zone.clone(),
            slice: args.slice.max(1),
            types: types.collect(),
        };
        source.check(original)?;
        Ok(source)
    }

    fn check(&self, original: &Original) -> Result<(), StartError> {
        for table in original.tables {
            let of_table = self.types.keys().filter(|(name, _)| name == table.name);
            let mut columns: Vec<String> = of_table.map(|(_, column)| column.clone()).collect();
            if !table.has_the_columns(&columns) {
                columns.sort();
                let found = match columns.is_empty() {
                    true => "is not there".to_owned(),
                    false => format!("has the columns {}", columns.join(", ")),
                };
                return Err(StartError::new(
                    format!("database {}: public.{} {found}", self.name, table.name),
                    format!(
                        "name the database of the system before with --from: its {} has {}",
                        table.name,
                        table.columns.join(", ")
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many orders, or whatever an import counts by, a slice has.
    pub fn slice(&self) -> i64 {
        self.slice
    }

    /// A column as a time, in SQL: NULL if the table does not have it, and by the zone that the
    /// command line names if its type has none.
    pub fn time_of(&self, table: &str, column: &str) -> String {
        let kind = self.types.get(&(table.to_owned(), column.to_owned()));
        match kind.map(String::as_str) {
            None => "NULL::timestamptz".to_owned(),
            Some("timestamp without time zone") => {
                let zone = self.zone.replace('\'', "''");
                format!("({column} AT TIME ZONE '{zone}')")
            }
            Some(_) => format!("{column}::timestamptz"),
        }
    }

    /// Begins a snapshot for all that follows.
    ///
    /// # Errors
    /// The database is away.
    pub async fn snapshot(&mut self) -> anyhow::Result<Tx<'_>> {
        let mut tx = self.db.begin_with(BEGIN_SNAPSHOT).await?;
        unbounded(&mut tx).await?;
        Ok(tx)
    }

    /// The highest id that a table has, or that its sequence has given.
    ///
    /// # Errors
    /// The database is away.
    pub async fn highest(&mut self, table: &str, id: &str) -> sqlx::Result<i64> {
        let statement = format!(
            "SELECT greatest(coalesce((SELECT max({id}) FROM public.{table}), 0),
                             coalesce(pg_sequence_last_value(pg_get_serial_sequence('public.{table}', '{id}')::regclass), 0))::bigint"
        );
        sqlx::query_scalar(AssertSqlSafe(statement))
            .fetch_one(&mut self.db)
            .await
    }

    /// What the tables hold: rows, highest ids, and a sum over all columns of all rows.
    pub(super) async fn figures(&mut self, original: &Original) -> anyhow::Result<String> {
        let mut tx = self.snapshot().await?;
        let mut figures = String::new();
        for table in original.tables {
            let (name, key) = (table.name, table.key);
            let statement = format!(
                "SELECT count(*), coalesce(max({key})::bigint, 0),
                        coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM public.{name} AS t"
            );
            let (rows, highest, sum): (i64, i64, String) = sqlx::query_as(AssertSqlSafe(statement))
                .fetch_one(&mut *tx)
                .await
                .with_context(|| format!("counting public.{name}"))?;
            let and = if figures.is_empty() { "" } else { "; " };
            let _ = write!(
                figures,
                "{and}{name}: {rows} rows, highest {key} {highest}, sum {sum}"
            );
        }
        tx.rollback().await?;
        Ok(figures)
    }

    /// Sessions that are connected besides those of this import.
    pub(super) async fn others(&mut self) -> sqlx::Result<Vec<String>> {
        // those without a user are the server's own; this works on servers older than ours, too
        sqlx::query_scalar(
            "SELECT format('process %s (user %s, application %s)', pid, usename, coalesce(nullif(application_name, ''), 'unnamed'))
             FROM pg_catalog.pg_stat_activity a
             WHERE datname = current_database() AND usesysid IS NOT NULL
               AND pid <> pg_backend_pid()
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
                               WHERE l.locktype = 'advisory' AND d.datname = a.datname AND l.pid = a.pid
                                 AND (l.classid::bigint << 32 | l.objid::bigint) = $1)
             ORDER BY pid",
        )
        .bind(LOCK)
        .fetch_all(&mut self.db)
        .await
    }

    /// # Errors
    /// [`StartError`] if others stay connected.
    pub(super) async fn alone(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let others = self.others().await?;
            if others.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(StartError::new(
                    format!(
                        "database {}: {} other sessions are connected: {}",
                        self.name,
                        others.len(),
                        others.join(", ")
                    ),
                    "stop the system before and all that is connected, then import again",
                )
                .into());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// An import reads, and writes, whole tables.
pub(super) async fn unbounded(db: &mut Db) -> sqlx::Result<()> {
    for name in [
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
    ] {
        sqlx::query("SELECT set_config($1, '0', TRUE)")
            .bind(name)
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}

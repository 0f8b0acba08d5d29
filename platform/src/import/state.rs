//! What a database says of an import: the one row of `<schema>.import`, and tables of the system
//! before in `public`.

use sqlx::{AssertSqlSafe, Executor, Postgres, Row as _, postgres::PgRow};

use super::Original;
use crate::{error::StartError, pg::Db};

/// Whether a service may work on its schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// There is nothing to take over, or it is settled what became of it.
    Settled,
    /// An import has begun and is not done.
    Running,
    /// Tables of the system before hold rows, and nobody has said what is to become of them.
    Waiting(Vec<String>),
}

/// Where an import stands.
pub(super) struct Row {
    pub(super) state: String,
    /// The database that is read.
    pub(super) source: String,
    /// What it held before the first slice.
    pub(super) figures: String,
    /// The highest id whose slice is committed.
    pub(super) through: Option<i64>,
}

/// Each statement in one message: behind a transaction pooler two may reach two servers.
pub(crate) async fn look<C>(db: &mut C, original: &Original) -> sqlx::Result<Found>
where
    C: Send,
    for<'c> &'c mut C: Executor<'c, Database = Postgres>,
{
    let tables = read_tables(db, original).await?;
    if tables.iter().any(|(name, _)| name == STATE) {
        let state = format!("SELECT state FROM {}.import", original.service);
        let row = fetch(db, state).await?.pop();
        match row.map(|row| row.try_get::<String, _>(0)).transpose()? {
            None => {}
            Some(state) if state == RUNNING => return Ok(Found::Running),
            Some(_) => return Ok(Found::Settled),
        }
    }
    let mut waiting = Vec::new();
    for table in original.tables {
        let found = tables.iter().find(|(name, _)| name == table.name);
        if found.is_some_and(|(_, columns)| table.has_the_columns(columns))
            && has_rows(db, table.name).await?
        {
            waiting.push(format!("public.{}", table.name));
        }
    }
    Ok(match waiting.is_empty() {
        true => Found::Settled,
        false => Found::Waiting(waiting),
    })
}

/// As a name among [`read_tables`]: no table has an empty one.
const STATE: &str = "";
const RUNNING: &str = "running";
const DONE: &str = "done";
const DECLINED: &str = "declined";

/// The tables of the system before that are there, by name, with their columns; and [`STATE`], if
/// there is one.
async fn read_tables<C>(db: &mut C, original: &Original) -> sqlx::Result<Vec<(String, Vec<String>)>>
where
    C: Send,
    for<'c> &'c mut C: Executor<'c, Database = Postgres>,
{
    let names: Vec<_> = original
        .tables
        .iter()
        .map(|table| format!("'{}'", table.name))
        .collect();
    let statement = format!(
        "SELECT CASE n.nspname WHEN 'public' THEN c.relname::text ELSE '{STATE}' END AS name,
                array_agg(a.attname::text) AS columns
         FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE c.relkind IN ('r', 'p')
           AND (n.nspname = 'public' AND c.relname IN ({}) OR n.nspname = '{}' AND c.relname = 'import')
         GROUP BY 1",
        names.join(", "),
        original.service
    );
    let rows = fetch(db, statement).await?;
    rows.iter()
        .map(|row| Ok((row.try_get("name")?, row.try_get("columns")?)))
        .collect()
}

async fn has_rows<C>(db: &mut C, table: &str) -> sqlx::Result<bool>
where
    C: Send,
    for<'c> &'c mut C: Executor<'c, Database = Postgres>,
{
    let asked = fetch(db, format!("SELECT EXISTS (SELECT FROM public.{table})")).await;
    match asked {
        Ok(rows) => rows.first().map_or(Ok(false), |row| row.try_get(0)),
        // of another owner: somebody who may read it must say
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501") => Ok(true),
        Err(error) => Err(error),
    }
}

async fn fetch<C>(db: &mut C, statement: String) -> sqlx::Result<Vec<PgRow>>
where
    C: Send,
    for<'c> &'c mut C: Executor<'c, Database = Postgres>,
{
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(db).await
}

impl Found {
    /// # Errors
    /// One line that names the command to be run.
    pub(crate) fn refuse(&self, original: &Original) -> Result<(), StartError> {
        let service = original.service;
        match self {
            Found::Settled => Ok(()),
            Found::Running => Err(StartError::new(
                format!("schema {service}: an import has begun and is not done"),
                format!("run `{service} import` again, it goes on where it ended"),
            )),
            Found::Waiting(tables) => Err(StartError::new(
                format!("{} hold what the system before left", tables.join(", ")),
                format!(
                    "take it over with `{service} import` (first with --dry-run), or leave it there with `{service} import --decline`"
                ),
            )),
        }
    }
}

impl Row {
    pub(super) fn is_declined(&self) -> bool {
        self.state == DECLINED
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == DONE
    }
}

/// Of a schema that may not be there.
pub(super) async fn find(db: &mut Db, original: &Original) -> sqlx::Result<Option<Row>> {
    let tables = read_tables(db, original).await?;
    match tables.iter().any(|(name, _)| name == STATE) {
        true => read(db, original.service).await,
        false => Ok(None),
    }
}

pub(super) async fn read(db: &mut Db, service: &str) -> sqlx::Result<Option<Row>> {
    let statement = format!("SELECT state, source, figures, through FROM {service}.import");
    let row = sqlx::query_as(AssertSqlSafe(statement))
        .fetch_optional(db)
        .await?;
    Ok(row.map(|(state, source, figures, through)| Row {
        state,
        source,
        figures,
        through,
    }))
}

/// Sessions of the service itself: it would go on with numbers that it has drawn.
pub(super) async fn count_at_work(db: &mut Db, service: &str) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "SELECT count(*) FROM pg_catalog.pg_stat_activity
         WHERE datname = current_database() AND (application_name = $1 OR application_name LIKE $1 || '-%')",
    )
    .bind(service)
    .fetch_one(db)
    .await
}

/// The import begins: in the transaction of its first slice.
pub(super) async fn begin(
    db: &mut Db,
    service: &str,
    source: &str,
    figures: &str,
) -> sqlx::Result<()> {
    let statement = format!(
        "INSERT INTO {service}.import (state, source, figures) VALUES ('{RUNNING}', $1, $2)
         ON CONFLICT ON CONSTRAINT import_pkey
         DO UPDATE SET state = excluded.state, source = excluded.source, figures = excluded.figures, changed_at = now()"
    );
    let begun = sqlx::query(AssertSqlSafe(statement));
    begun.bind(source).bind(figures).execute(db).await?;
    Ok(())
}

/// A slice is written, up to this id.
pub(super) async fn advance(db: &mut Db, service: &str, through: i64) -> sqlx::Result<()> {
    let statement = format!("UPDATE {service}.import SET through = $1, changed_at = now()");
    let advanced = sqlx::query(AssertSqlSafe(statement));
    advanced.bind(through).execute(db).await?;
    Ok(())
}

pub(super) async fn end(db: &mut Db, service: &str) -> sqlx::Result<()> {
    let statement = format!("UPDATE {service}.import SET state = '{DONE}', changed_at = now()");
    sqlx::query(AssertSqlSafe(statement)).execute(db).await?;
    Ok(())
}

/// `false`: an import has begun, or is done.
pub(super) async fn decline(db: &mut Db, service: &str) -> sqlx::Result<bool> {
    let statement = format!(
        "INSERT INTO {service}.import AS i (state) VALUES ('{DECLINED}')
         ON CONFLICT ON CONSTRAINT import_pkey DO UPDATE SET changed_at = i.changed_at WHERE i.state = '{DECLINED}'"
    );
    let declined = sqlx::query(AssertSqlSafe(statement)).execute(db).await?;
    Ok(declined.rows_affected() == 1)
}

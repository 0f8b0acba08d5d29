//! Brings a schema up to date while a service works on it. No lock that a call could meet is waited for longer than a call
//! would not notice, nothing that reads a whole table keeps others from writing to it, and a run that was cut goes on.

use std::time::Duration;

use anyhow::Context as _;
use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, SqlSafeStr as _, SqlStr,
    migrate::{Migrate as _, MigrateError, Migration, Migrator},
};
use tokio::time::Instant;

use crate::{
    command::{self, Access, Unavailable},
    config::PostgresConfig,
    pg::{self, Failure},
};

/// What is done in place of a released file that builds an index, or checks a constraint, with its table locked. Released
/// files are never edited, and most of the databases that will ever be have applied them as they are; the others come to the
/// same schema by this way, and the file is recorded as applied, with its own checksum.
pub struct Online {
    /// The version of the file.
    pub version: i64,
    /// Done first, one after the other; from the first again if one of them, or the process, was cut.
    pub before: &'static [Step],
    /// The rest, in the transaction that records the file: short locks only.
    pub then: &'static str,
}

/// One statement.
pub enum Step {
    /// Nobody who reads or writes waits for it, or behind it: CONCURRENTLY, VALIDATE CONSTRAINT. Outside of a transaction.
    Concurrent(&'static str),
    /// It needs the table for itself, for a moment.
    Brief(&'static str),
}

/// How long a lock is waited for that everybody else queues behind.
const LOCK_TIMEOUT: &str = "50ms";
/// Between two tries to get it: the queue behind the last one is gone by then.
const LOCK_AGAIN: Duration = Duration::from_millis(200);
/// Then it is said that something sits on the table. Autovacuum may, for minutes, and does not give way to a wait so short.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks whether another `migrate` has ended.
const POLL: Duration = Duration::from_millis(250);
/// Times that a statement is tried which PostgreSQL ends because of a deadlock.
const DEADLOCKS: usize = 5;

/// The session's own settings. Statements have no bound, a large index takes hours; one processor is left to the calls; and a
/// `migrate` that is killed does not leave a backend behind that builds on, and holds the lock, for nobody.
const SETTINGS: [&str; 4] = [
    "SET statement_timeout = 0",
    "SET lock_timeout = 0",
    "SET max_parallel_maintenance_workers = 0",
    "SET client_connection_check_interval = '1s'",
];

/// Applies what is not applied yet, over one direct connection, one `migrate` at a time in a database; a database that is
/// away is waited for. Then it writes the time-outs of `config` down as those of its role in this database: so they hold
/// behind a pooler too, which refuses or forgets what a session sets.
///
/// # Errors
/// [`Unavailable`] for a database that is away or a table that stays locked; a migration that
/// fails, or was edited. The schema is as it was before that migration.
pub async fn migrate(
    config: &PostgresConfig,
    migrator: &Migrator,
    online: &[Online],
    wait: Duration,
) -> anyhow::Result<()> {
    let server = command::server(&pg::connect_options(config, "migrate")?);
    let mut db = command::connect_within(config, "migrate", Access::Write, wait).await?;
    let done = locked(&mut db, config, migrator, online).await;
    db.close().await.ok();
    done.map_err(|error| explain(error).context(format!("migrating {server}")))
}

/// An outage is no fault of a migration.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let met = error.chain().find_map(|cause| cause.downcast_ref());
    match met.map(Failure::of) {
        Some(failure) if failure.is_outage() => Unavailable::new(format!("{error:#}")).into(),
        _ => error,
    }
}

async fn locked(
    db: &mut PgConnection,
    config: &PostgresConfig,
    migrator: &Migrator,
    online: &[Online],
) -> anyhow::Result<()> {
    for setting in SETTINGS {
        // a server too old for one does without
        sqlx::raw_sql(setting).execute(&mut *db).await.ok();
    }
    let key = lock_key(db).await?;
    if !try_lock(db, key).await? {
        tracing::info!("another migrate is at work, waiting for it");
        while !try_lock(db, key).await? {
            tokio::time::sleep(POLL).await;
        }
    }
    apply_all(db, migrator, online).await?;
    set_role_timeouts(db, config).await?;
    sqlx::query("SELECT pg_advisory_unlock($1)")
        .bind(key)
        .execute(db)
        .await?;
    Ok(())
}

/// Never a statement that waits: it would hold a snapshot, which CREATE INDEX CONCURRENTLY waits for in its turn.
async fn try_lock(db: &mut PgConnection, key: i64) -> sqlx::Result<bool> {
    sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
        .bind(key)
        .fetch_one(db)
        .await
}

/// The advisory lock that sqlx takes, and so the `migrate` of the release before: a number times the CRC-32 of the
/// database's name.
async fn lock_key(db: &mut PgConnection) -> sqlx::Result<i64> {
    let name: String = sqlx::query_scalar("SELECT current_database()::text")
        .fetch_one(db)
        .await?;
    let mut crc = u32::MAX;
    for byte in name.bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    Ok(0x3d32_ad9e * i64::from(!crc))
}

async fn apply_all(
    db: &mut PgConnection,
    migrator: &Migrator,
    online: &[Online],
) -> anyhow::Result<()> {
    let table = &*migrator.table_name;
    for schema in migrator.create_schemas.iter() {
        db.create_schema_if_not_exists(schema).await?;
    }
    db.ensure_migrations_table(table).await?;
    let applied = db.list_applied_migrations(table).await?;
    let known = |version| migrator.version_exists(version);
    let last = migrator.iter().map(|file| file.version).max().unwrap_or(0);
    // later ones are those of a release after this one: it runs beside, or this one was put back in its place
    if let Some(lost) = applied
        .iter()
        .find(|file| file.version < last && !known(file.version))
    {
        return Err(MigrateError::VersionMissing(lost.version).into());
    }
    let mut previous: Option<&Migration> = None;
    for file in migrator.iter() {
        match applied.iter().find(|known| known.version == file.version) {
            Some(applied) if applied.checksum != file.checksum => {
                return Err(MigrateError::VersionMismatch(file.version).into());
            }
            Some(_) => {}
            None => {
                let online = online.iter().find(|online| online.version == file.version);
                apply(db, table, file, previous, online)
                    .await
                    .with_context(|| format!("migration {:04}", file.version))?;
            }
        }
        previous = Some(file);
    }
    Ok(())
}

async fn apply(
    db: &mut PgConnection,
    table: &str,
    file: &Migration,
    previous: Option<&Migration>,
    online: Option<&Online>,
) -> anyhow::Result<()> {
    if let Some(online) = online {
        prepare(db, online).await?;
        let file = Migration {
            sql: online.then.into_sql_str(),
            ..file.clone()
        };
        return Ok(briefly(db, async |db| db.apply(table, &file).await.map(drop)).await?);
    }
    if !file.no_tx {
        return Ok(briefly(db, async |db| db.apply(table, file).await.map(drop)).await?);
    }
    // a build that was cut leaves an INVALID index under its name, and the file that drops it is done already
    if let Some(drop) = previous.filter(|file| drops_an_index(file)) {
        run(db, drop.sql.clone()).await?;
    }
    db.apply(table, file).await?;
    Ok(())
}

fn drops_an_index(file: &Migration) -> bool {
    let mut lines = file.sql.as_str().lines();
    let statement = lines.find(|line| !line.starts_with("--") && !line.trim().is_empty());
    let drops = |line: &str| line.starts_with("DROP INDEX CONCURRENTLY IF EXISTS");
    file.no_tx && statement.is_some_and(drops)
}

async fn prepare(db: &mut PgConnection, online: &Online) -> Result<(), MigrateError> {
    let mut deadlocks = 0;
    'from_the_first: loop {
        for step in online.before {
            let done = match step {
                Step::Concurrent(statement) => run(db, statement.into_sql_str()).await,
                Step::Brief(statement) => {
                    briefly(db, async |db| run(db, statement.into_sql_str()).await).await
                }
            };
            match done {
                // the release before waits for the lock of `migrate` in a statement, which CONCURRENTLY waits for
                Err(MigrateError::Execute(error))
                    if Failure::of(&error) == Failure::Conflict && deadlocks < DEADLOCKS =>
                {
                    deadlocks += 1;
                    continue 'from_the_first;
                }
                done => done?,
            }
        }
        return Ok(());
    }
}

async fn run(db: &mut PgConnection, statement: SqlStr) -> Result<(), MigrateError> {
    sqlx::raw_sql(statement).execute(db).await?;
    Ok(())
}

/// Does work that needs a table for itself: everybody queues behind a wait for that, so it waits [`LOCK_TIMEOUT`], lets the
/// queue pass and tries again.
async fn briefly(
    db: &mut PgConnection,
    work: impl AsyncFn(&mut PgConnection) -> Result<(), MigrateError>,
) -> Result<(), MigrateError> {
    run(
        db,
        AssertSqlSafe(format!("SET lock_timeout = '{LOCK_TIMEOUT}'")).into_sql_str(),
    )
    .await?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match work(db).await {
            Err(error) if waited_for_a_lock(&error) && Instant::now() < until => {
                tokio::time::sleep(LOCK_AGAIN).await;
            }
            done => {
                done?;
                return run(db, "SET lock_timeout = 0".into_sql_str()).await;
            }
        }
    }
}

fn waited_for_a_lock(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some("55P03")
}

/// Writes the time-outs of `config` down as the defaults of the role that migrates, in this database, where they differ.
async fn set_role_timeouts(db: &mut PgConnection, config: &PostgresConfig) -> sqlx::Result<()> {
    let written: Vec<String> = sqlx::query_scalar(
        "SELECT unnest(s.setconfig) FROM pg_catalog.pg_db_role_setting s
         JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
         JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
         WHERE d.datname = current_database() AND r.rolname = current_user",
    )
    .fetch_all(&mut *db)
    .await?;
    let database: String = sqlx::query_scalar("SELECT quote_ident(current_database())")
        .fetch_one(&mut *db)
        .await?;
    for (name, timeout) in [
        ("lock_timeout", config.lock_timeout),
        ("statement_timeout", config.statement_timeout),
        (
            "idle_in_transaction_session_timeout",
            config.idle_in_transaction_timeout,
        ),
    ] {
        let millis = timeout.as_millis();
        if !written.contains(&format!("{name}={millis}")) {
            let set =
                format!("ALTER ROLE CURRENT_USER IN DATABASE {database} SET {name} = {millis}");
            sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut *db).await?;
        }
    }
    Ok(())
}

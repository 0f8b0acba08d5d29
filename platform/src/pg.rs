//! PostgreSQL: connections whose every wait has a bound, migrations, and what an error means for the one who must react.

mod database;
mod db;
mod error;
mod pool;

use std::time::Duration;

use sqlx::{ConnectOptions as _, migrate::Migrator};

pub use self::{
    database::{Database, State},
    db::{Db, Tx},
    error::{Error, Failure},
    pool::Pool,
};
use crate::{config::PostgresConfig, error::StartError};

/// What stores' callers get.
pub type Result<T> = std::result::Result<T, Error>;

/// Applies what is not applied yet, over one direct connection.
///
/// # Errors
/// No connection, or a migration that fails.
pub async fn migrate(
    config: &PostgresConfig,
    migrator: &Migrator,
) -> std::result::Result<(), StartError> {
    // a migration may rewrite a table: its statements have no bound, waiting for a lock does
    let options = database::connect_options(config)?
        .application_name("migrate")
        .options([("lock_timeout", config.lock_timeout.as_millis().to_string())]);
    let server = format!("{}:{}", options.get_host(), options.get_port());
    let connecting = tokio::time::timeout(CONNECT_BOUND, options.connect()).await;
    let connecting = connecting.map_err(|_| format!("no answer within {CONNECT_BOUND:?}"));
    let connected = connecting.and_then(|made| made.map_err(|error| error.to_string()));
    let mut connection = connected.map_err(|cause| {
        StartError::new(
            format!("connecting to PostgreSQL at {server}: {cause}"),
            "start it, or correct postgres.connection_string",
        )
    })?;
    migrator.run(&mut connection).await.map_err(|error| {
        StartError::new(
            format!("migrating {server}: {error}"),
            "the schema is as it was before this migration",
        )
    })
}

/// A name that resolves slowly and a server that is starting get this long.
const CONNECT_BOUND: Duration = Duration::from_secs(10);

/// One connection, for a command that does one thing.
///
/// # Errors
/// What PostgreSQL, or the network, said.
pub async fn connect_as(
    config: &PostgresConfig,
    application: &'static str,
) -> std::result::Result<Db, StartError> {
    let service = application.split('-').next().unwrap_or(application);
    let database = Database::of_any_schema(service, config)?;
    database.connect_as(application).await.map_err(|error| {
        StartError::new(
            format!("connecting to PostgreSQL: {error}"),
            "start it, or correct postgres.connection_string",
        )
    })
}

/// The version of the last migration of this binary.
fn newest(migrator: &Migrator) -> i64 {
    let versions = migrator.iter().map(|migration| migration.version);
    versions.max().unwrap_or(0)
}

/// The version of the last migration that has been applied; later ones than this binary knows are fine, so that releases
/// can overlap.
async fn schema_version(db: &mut Db, migrator: &Migrator) -> sqlx::Result<i64> {
    let statement = format!(
        "SELECT coalesce(max(version), 0) FROM {} WHERE success",
        migrator.table_name
    );
    sqlx::query_scalar(sqlx::AssertSqlSafe(statement))
        .persistent(false)
        .fetch_one(db)
        .await
}

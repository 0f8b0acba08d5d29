//! PostgreSQL: connections whose every wait has a bound, and what an error means for the one who must react.

mod database;
mod db;
mod error;
mod gauges;
mod lent;
mod options;
mod pool;
mod queue;

use sqlx::{Row as _, migrate::Migrator, postgres::PgConnectOptions};

pub use self::{
    database::{Database, State},
    db::{Db, Tx},
    error::{Error, Failure},
    pool::Pool,
};
use crate::{command::Unavailable, config::PostgresConfig, error::StartError};

/// What stores' callers get.
pub type Result<T> = std::result::Result<T, Error>;

/// How a command connects by itself.
pub(crate) fn connect_options(
    config: &PostgresConfig,
    application: &str,
) -> std::result::Result<PgConnectOptions, StartError> {
    Ok(options::connect_options(config)?.application_name(application))
}

/// One connection, for a command that does one thing. Behind a transaction pooler it does that in
/// transactions.
///
/// # Errors
/// [`StartError`] for a connection string that is none; [`Unavailable`] with what PostgreSQL, or the network, said.
pub async fn connect_as(config: &PostgresConfig, application: &'static str) -> anyhow::Result<Db> {
    let service = application.split('-').next().unwrap_or(application);
    let database = Database::of_any_schema(service, config)?;
    let connected = database.connect_as(application).await;
    Ok(connected.map_err(|error| Unavailable::new(format!("PostgreSQL: {error}")))?)
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
    // in one message: behind a transaction pooler two may reach two servers
    let row = sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .fetch_one(db)
        .await?;
    row.try_get(0)
}

//! A database for each test, made and dropped by the administrator of `DATABASE_URL`, whom only this file knows; the test
//! and the service under test are its owner.
//!
//! A copy of a migrated template takes 0.2 s, a drop most of a second, nearly all of it a checkpoint. So under
//! `devstack pg --`, which names its run in `TESTKIT_RUN` and leaves nothing of it behind, nobody waits for a drop. On a
//! server without such a run the databases of tests that passed are gone when the tests have ended; what stays for the next
//! is a template of each service, and the three users.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use platform::{config::PostgresConfig, migrate};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use sqlx::{Connection as _, PgConnection, PgPool, migrate::Migrator, postgres::PgPoolOptions};

use crate::owner;

/// A pool of the owner of a database of the test's own, migrated as the service does it. The database goes with the last
/// clone of the pool, if the test passes.
///
/// The time-outs that `migrate` writes down for the role are not copied: tests hold rows for longer, and a service that
/// connects directly sets its own.
///
/// # Panics
/// Without `DATABASE_URL` of a superuser.
pub async fn database(service: &str, migrator: &'static Migrator) -> PgPool {
    made(service, Some(migrator)).await
}

/// The same without a table, or a schema.
///
/// # Panics
/// Without `DATABASE_URL` of a superuser.
pub async fn empty_database(service: &str) -> PgPool {
    made(service, None).await
}

/// A pool of the server's administrator in the same database, for what no owner may do. Never for the service under test.
///
/// # Panics
/// Without `DATABASE_URL` of a superuser.
pub async fn admin(pool: &PgPool) -> PgPool {
    let options = pool.connect_options();
    let name = options.get_database().expect("a database");
    let url = owner::with_database(&server(), name).expect("DATABASE_URL is a URL");
    let pool = PgPoolOptions::new().max_connections(2).connect(&url).await;
    pool.expect("a connection of the administrator")
}

/// The URL of the pool's user and database: what goes into a service's `postgres.connection_string`.
///
/// # Panics
/// Without `DATABASE_URL` of a superuser.
pub fn url(pool: &PgPool) -> String {
    let options = pool.connect_options();
    let name = options.get_database().expect("a database");
    let url = owner::owner_url(&server(), options.get_username(), name);
    url.expect("DATABASE_URL is a URL")
}

fn server() -> String {
    std::env::var("DATABASE_URL").expect("DATABASE_URL, as `devstack pg --` sets it")
}

/// The run that cleans up after us.
fn run() -> Option<String> {
    std::env::var("TESTKIT_RUN").ok()
}

async fn made(service: &str, migrator: Option<&'static Migrator>) -> PgPool {
    make(service, migrator)
        .await
        .unwrap_or_else(|error| panic!("a database of {service}: {error:#}"))
}

async fn make(service: &str, migrator: Option<&'static Migrator>) -> Result<PgPool> {
    static PROCESS: LazyLock<String> =
        LazyLock::new(|| uuid::Uuid::new_v4().simple().to_string()[..12].to_owned());
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let server = server();
    let mut admin = PgConnection::connect(&server).await.context("connect")?;
    let template = match migrator {
        Some(migrator) => Some(template(&mut admin, &server, service, migrator).await?),
        None => None,
    };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let run = run().unwrap_or_default();
    let name = format!("test_{run}_{service}_{}_{number}", *PROCESS);
    owner::create_database(&mut admin, &server, &name, service, template.as_deref()).await?;
    admin.close().await?;
    let url = owner::owner_url(&server, service, &name)?;
    let dropped = DropWithPool(name);
    let pool = PgPoolOptions::new()
        .max_connections(5)
        .idle_timeout(Duration::from_secs(1))
        .before_acquire(move |_, _| {
            let _kept_as_long_as_the_pool = &dropped;
            Box::pin(async { Ok(true) })
        });
    pool.connect(&url)
        .await
        .with_context(|| format!("the user {service} was there, with a password of another's?"))
}

/// The name of a database that `service` has migrated and nobody is connected to. Its name tells the migrations, so that
/// with others there is another template.
async fn template(
    admin: &mut PgConnection,
    server: &str,
    service: &str,
    migrator: &'static Migrator,
) -> Result<String> {
    let hash = migrator.iter().fold(Sha256::new(), |hash, migration| {
        hash.chain_update(&migration.checksum)
    });
    let hash = u64::from_be_bytes(hash.finalize()[..8].try_into()?);
    let run = run().unwrap_or_default();
    let name = format!("test_{run}_{service}_template_{hash:016x}");
    if exists(admin, &name).await? {
        return Ok(name);
    }
    // one process makes it, the others wait; the lock goes with the connection
    sqlx::query("SELECT pg_advisory_lock(hashtext($1))")
        .bind(&name)
        .execute(&mut *admin)
        .await?;
    if !exists(admin, &name).await? {
        // it has its name when it is whole
        let raw = format!("{name}_raw");
        owner::drop_database(admin, &raw).await?;
        owner::create_database(admin, server, &raw, service, None).await?;
        let url = owner::owner_url(server, service, &raw)?;
        let config: PostgresConfig = serde_json::from_value(json!({"connection_string": url}))?;
        migrate::migrate(&config, migrator, &[], Duration::ZERO).await?;
        let rename = format!("ALTER DATABASE {raw} RENAME TO {name}");
        sqlx::query(sqlx::AssertSqlSafe(rename))
            .execute(&mut *admin)
            .await?;
    }
    sqlx::query("SELECT pg_advisory_unlock_all()")
        .execute(admin)
        .await?;
    Ok(name)
}

async fn exists(admin: &mut PgConnection, name: &str) -> Result<bool> {
    let exists = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)";
    Ok(sqlx::query_scalar(exists)
        .bind(name)
        .fetch_one(admin)
        .await?)
}

/// A database that is dropped when its pool is; that of a test that fails is left to be looked at.
struct DropWithPool(String);

impl Drop for DropWithPool {
    fn drop(&mut self) {
        let name = std::mem::take(&mut self.0);
        if std::thread::panicking() {
            eprintln!("the database {name} is left to be looked at");
            return;
        }
        // the runtime of the test may be ending
        let dropping = std::thread::spawn(move || drop_apart(&name));
        if run().is_none() {
            let dropped = dropping.join().expect("no panic");
            dropped.expect("the database is dropped");
        }
    }
}

fn drop_apart(name: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut admin = PgConnection::connect(&server()).await?;
        owner::drop_database(&mut admin, name).await
    })
}

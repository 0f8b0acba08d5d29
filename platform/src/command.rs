//! What the commands that need a database share: they wait for one that is away, for as long as `--wait` says, and then end
//! with an exit code of its own.

use std::{fmt, io, time::Duration};

use clap::Args;
use sqlx::{ConnectOptions as _, PgConnection, postgres::PgConnectOptions};
use tokio::time::Instant;

use crate::{config::PostgresConfig, error::StartError, pg};

/// The arguments of a command that needs a database.
#[derive(Args, Clone, Copy, Debug)]
pub struct WaitArgs {
    /// How long to wait for a database that is away, before exit code 69
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime_serde::re::humantime::parse_duration)]
    pub wait: Duration,
}

/// What a command does with the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A standby will do.
    Read,
    /// A server that is read-only is not the one that is meant.
    Write,
}

/// What a command needs is not there, as the command itself is not to blame for: exit code 69, EX_UNAVAILABLE of sysexits.h.
#[derive(Debug)]
pub struct Unavailable(String);

impl Unavailable {
    pub fn new(what: impl Into<String>) -> Self {
        Unavailable(what.into())
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// Exit code for [`Unavailable`].
pub const EXIT_UNAVAILABLE: u8 = 69;

/// Between two tries: a server that has just started should not be told so late.
const AGAIN: Duration = Duration::from_millis(250);
/// One try: a server that says nothing is tried again, there may be another one by then.
const TRY: Duration = Duration::from_secs(10);

/// A connection for a command, as soon as there is one. Everything that a server or a name server says is waited out: it may
/// be starting, its password or its database may be made by something that runs beside.
///
/// # Errors
/// [`StartError`] at once if no wait can help: a connection string that is none, a certificate that cannot be read.
/// [`Unavailable`] after `wait`, with what was said last.
pub async fn connect_within(
    config: &PostgresConfig,
    application: &str,
    access: Access,
    wait: Duration,
) -> anyhow::Result<PgConnection> {
    let options = pg::connect_options(config, application)?;
    // a wait for ever is one, not an overflow
    let until = Instant::now().checked_add(wait);
    loop {
        let cause = match tokio::time::timeout(TRY, connect(&options, access)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(Refused::ForGood(error))) => return Err(error.into()),
            Ok(Err(Refused::Now(cause))) => cause,
            Err(_) => format!("no answer within {TRY:?}"),
        };
        if until.is_some_and(|until| Instant::now() >= until) {
            let server = server(&options);
            return Err(Unavailable::new(format!("PostgreSQL at {server}: {cause}")).into());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Waits as [`connect_within`] does, for a command that has other ways to its connections.
///
/// # Errors
/// Those of [`connect_within`].
pub async fn wait_for_database(
    config: &PostgresConfig,
    application: &str,
    access: Access,
    wait: Duration,
) -> anyhow::Result<()> {
    use sqlx::Connection as _;

    let connection = connect_within(config, application, access, wait).await?;
    connection.close().await.ok();
    Ok(())
}

/// How errors name it.
pub(crate) fn server(options: &PgConnectOptions) -> String {
    format!("{}:{}", options.get_host(), options.get_port())
}

enum Refused {
    Now(String),
    ForGood(StartError),
}

async fn connect(options: &PgConnectOptions, access: Access) -> Result<PgConnection, Refused> {
    let mut connection = options.connect().await.map_err(|error| {
        if is_ours(options, &error) {
            Refused::ForGood(StartError::new(
                format!("postgres.connection_string: {error}"),
                "correct it, or what it names",
            ))
        } else {
            Refused::Now(error.to_string())
        }
    })?;
    if access == Access::Write {
        // also on in a standby
        let read_only = "SELECT current_setting('transaction_read_only') = 'on'";
        let asked = sqlx::query_scalar(read_only)
            .persistent(false)
            .fetch_one(&mut connection)
            .await;
        if asked.map_err(|error| Refused::Now(error.to_string()))? {
            return Err(Refused::Now("it is read-only".into()));
        }
    }
    Ok(connection)
}

/// Whether it comes from a file or a value of ours: of a connection over TCP only certificates are files.
fn is_ours(options: &PgConnectOptions, error: &sqlx::Error) -> bool {
    let missing = [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied];
    let over_tcp = options.get_socket().is_none() && !options.get_host().starts_with('/');
    match error {
        sqlx::Error::Configuration(_) => true,
        sqlx::Error::Io(error) => over_tcp && missing.contains(&error.kind()),
        _ => false,
    }
}

//! The PostgreSQL of a run: the server in `DATABASE_URL`, or an embedded one owned by a child process that stops it when
//! our end of its stdin is closed, however we end. Databases and users made here are dropped here, and only those: the
//! users that services run as own their databases and may do nothing else.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use testkit::owner::{create_database, drop_database, owner_url, with_database};
use tokio::{process::Command, time::timeout};

use crate::{binaries::SERVICES, failure::Misuse, owner::Owner};

/// Download, initdb and start; the child has bounds of its own for each, this one is for a child that hangs.
const START_BOUND: Duration = Duration::from_secs(300);
/// A fast shutdown writes a checkpoint: seconds on a slow disk.
const STOP_BOUND: Duration = Duration::from_secs(60);
/// Its role's time-outs in a service's database are made for the service's statements, not for ours.
const UNBOUNDED: &str =
    "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0";
/// The settings without which a commit may be lost, and with it every promise of the services.
const DURABILITY: [&str; 3] = ["fsync", "full_page_writes", "synchronous_commit"];
/// `nobody`: the uid that owns the server when we are root, because initdb refuses root.
pub(crate) const UNPRIVILEGED: u32 = 65534;

/// A connection of ours to the database of a service, whose statements take as long as they take.
pub(crate) async fn connect(url: &str) -> Result<PgConnection> {
    let mut db = PgConnection::connect(url)
        .await
        .context("connect to a service's database")?;
    sqlx::raw_sql(UNBOUNDED).execute(&mut db).await?;
    Ok(db)
}

/// What the owner says on its stdout when the server answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) url: String,
}

/// Names the run that drops what tests make; a run within it leaves that, and the users, to it.
pub(crate) const RUN: &str = "TESTKIT_RUN";

/// Which server a run uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The one in `DATABASE_URL`, or an embedded one.
    Environment,
    /// An embedded one whatever `DATABASE_URL` says, because it will be made to crash.
    Own,
}

/// A server that answers and keeps what it commits.
pub struct Server {
    url: String,
    embedded: Option<Embedded>,
    made: Vec<String>,
    /// The services' users that were not there when this run began; `None` if another run drops them.
    own_users: Option<Vec<String>>,
    /// The run whose tests have made databases here.
    tests: Option<String>,
}

/// The child that owns an embedded server, and the data that it removes.
struct Embedded {
    owner: Owner,
    dir: PathBuf,
}

impl Server {
    /// The server of `source`; an embedded one's owner is `devstack` (this executable).
    pub async fn start(devstack: &Path, source: Source) -> Result<Server> {
        let given = std::env::var("DATABASE_URL").ok();
        let given = given.filter(|url| source == Source::Environment && !url.is_empty());
        let (url, embedded) = match given {
            Some(url) => (url, None),
            None => {
                let (url, embedded) = Embedded::spawn(devstack).await?;
                (url, Some(embedded))
            }
        };
        let mut server = Server {
            url,
            embedded,
            made: Vec::new(),
            own_users: None,
            tests: None,
        };
        server.verify_durability().await?;
        if std::env::var_os(RUN).is_none() {
            server.own_users = Some(server.missing_users().await?);
        }
        Ok(server)
    }

    /// The administrator's URL. No service gets it.
    pub fn admin_url(&self) -> &str {
        &self.url
    }

    /// Where it listens and whose it is, for people.
    pub fn description(&self) -> &'static str {
        if self.embedded.is_some() {
            "embedded PostgreSQL"
        } else {
            "PostgreSQL in DATABASE_URL"
        }
    }

    /// Makes a database of the user that `service` runs as, and answers the URL of that user.
    pub async fn create_database(&mut self, name: &str, service: &str) -> Result<String> {
        let mut admin = self.connect().await?;
        let url = owner_url(&self.url, service, name)?;
        let made = create_database(&mut admin, &self.url, name, service, None).await;
        made.map_err(|error| {
            Misuse::error(format!("{error:#}"), "let DATABASE_URL name a superuser")
        })?;
        self.made.push(name.to_owned());
        Ok(url)
    }

    /// The administrator's URL of a database, for what its owner may not look at.
    pub fn admin_url_of(&self, database: &str) -> Result<String> {
        with_database(&self.url, database)
    }

    /// Cuts every connection off and ends the server at once (`pg_ctl -m immediate`). Only an embedded one.
    pub async fn crash(&mut self) -> Result<()> {
        self.owner()?.crash().await
    }

    /// Starts it again, on the same port and data: it replays its log.
    pub async fn recover(&mut self) -> Result<()> {
        self.owner()?.recover().await
    }

    fn owner(&mut self) -> Result<&mut Owner> {
        let embedded = self.embedded.as_mut();
        let embedded = embedded.context("a server that is not ours cannot be made to crash")?;
        Ok(&mut embedded.owner)
    }

    /// Drops what was made and stops what was started.
    pub async fn stop(mut self) -> Result<()> {
        if let Some(embedded) = self.embedded.take() {
            // the databases go with the server
            return embedded.stop().await;
        }
        let mut admin = self.connect().await?;
        if let Some(run) = &self.tests {
            let theirs =
                "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)";
            let theirs = sqlx::query_scalar(theirs).bind(format!("test_{run}_"));
            self.made.extend(theirs.fetch_all(&mut admin).await?);
        }
        for name in &self.made {
            drop_database(&mut admin, name).await?;
        }
        for user in self.own_users.into_iter().flatten() {
            // not one that owns the databases of another run
            let drop = AssertSqlSafe(format!("DROP ROLE IF EXISTS {user}"));
            let _ = sqlx::query(drop).execute(&mut admin).await;
        }
        Ok(())
    }

    /// Begins a run of tests, whose databases are dropped with those made here, and names it.
    pub fn begin_tests(&mut self) -> String {
        let run = uuid::Uuid::new_v4().simple().to_string()[..8].to_owned();
        self.tests.insert(run).clone()
    }

    async fn missing_users(&self) -> Result<Vec<String>> {
        let missing = "SELECT name FROM unnest($1::text[]) AS name
                       WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)";
        let missing = sqlx::query_scalar(missing).bind(&SERVICES[..]);
        Ok(missing.fetch_all(&mut self.connect().await?).await?)
    }

    async fn connect(&self) -> Result<PgConnection> {
        let connecting = timeout(Duration::from_secs(10), PgConnection::connect(&self.url)).await;
        let remedy = "correct DATABASE_URL, or unset it for an embedded server";
        match connecting {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(Misuse::error(
                format!("connecting to PostgreSQL: {error}"),
                remedy,
            )),
            Err(_) => Err(Misuse::error(
                "connecting to PostgreSQL: no answer in 10 s",
                remedy,
            )),
        }
    }

    async fn verify_durability(&self) -> Result<()> {
        let mut connection = self.connect().await?;
        for name in DURABILITY {
            let row = sqlx::query("SELECT current_setting($1)")
                .bind(name)
                .fetch_one(&mut connection)
                .await?;
            let value: String = row.try_get(0)?;
            if value != "on" {
                let what = format!("PostgreSQL runs with {name} {value}");
                return Err(Misuse::error(
                    what,
                    format!("set {name} to on: every promise here rests on it"),
                ));
            }
        }
        Ok(())
    }
}

impl Embedded {
    async fn spawn(devstack: &Path) -> Result<(String, Embedded)> {
        let root = nix::unistd::Uid::effective().is_root();
        let install = install_dir(root)?;
        let dir = data_dir(root)?;
        let mut command = Command::new(devstack);
        command
            .arg("pg-owner")
            .args([&dir, &install])
            // a shell's working directory may be closed to the uid that the child takes
            .current_dir(&dir)
            .env("LC_ALL", "C")
            .env("HOME", &dir)
            .env_remove("PGDATA")
            .env_remove("PGOPTIONS");
        match Owner::spawn::<Started>("PostgreSQL", command, START_BOUND).await {
            Ok((owner, started)) => Ok((started.url, Embedded { owner, dir })),
            Err(error) => {
                // the child removes it, unless it never ran
                let _ = std::fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    async fn stop(self) -> Result<()> {
        self.owner.stop(STOP_BOUND).await?;
        if self.dir.exists() {
            std::fs::remove_dir_all(&self.dir).context("remove the data of PostgreSQL")?;
        }
        Ok(())
    }
}

/// A folder for one server's data, in the first temporary folder that its uid can reach.
fn data_dir(root: bool) -> Result<PathBuf> {
    let candidates = [
        std::env::temp_dir(),
        PathBuf::from("/tmp"),
        PathBuf::from("/var/tmp"),
    ];
    let base = candidates
        .iter()
        .find(|dir| dir.is_dir() && (!root || open_to_all(dir)));
    let base = base.ok_or_else(|| {
        let remedy = "set TMPDIR to one that every user may write to";
        Misuse::error("no temporary folder for PostgreSQL", remedy)
    })?;
    let dir = tempfile::Builder::new()
        .prefix("devstack-pg-")
        // the password is in there
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(base)?
        .keep();
    give(&dir, root)?;
    Ok(dir)
}

/// Where the server's programs are kept between runs, so that only the first one downloads them.
fn install_dir(root: bool) -> Result<PathBuf> {
    let cache = if root {
        PathBuf::from("/var/cache")
    } else {
        let home = || std::env::home_dir().map(|home| home.join(".cache"));
        std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            // the specification says to ignore an empty or relative one
            .filter(|dir| dir.is_absolute())
            .or_else(home)
            .context("neither HOME nor XDG_CACHE_HOME")?
    };
    let dir = cache.join("devstack/postgresql");
    std::fs::create_dir_all(&dir).map_err(|error| {
        Misuse::error(
            format!("making {}: {error}", dir.display()),
            "make it writable: PostgreSQL is kept there",
        )
    })?;
    give(&dir, root)?;
    Ok(dir)
}

fn give(dir: &Path, root: bool) -> Result<()> {
    if root {
        std::os::unix::fs::chown(dir, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).context("chown")?;
    }
    Ok(())
}

/// Whether every user may make folders here and remove them again: it is writable by others, it and all above it are
/// executable by them. Who owns the server is not root, and removes the data however we end.
fn open_to_all(dir: &Path) -> bool {
    let allows = |dir: &Path, mode: u32| {
        dir.metadata().is_ok_and(|meta| {
            meta.permissions().mode() & mode == mode || meta.uid() == UNPRIVILEGED
        })
    };
    allows(dir, 0o003) && dir.ancestors().all(|dir| allows(dir, 0o001))
}

//! The child process that owns an embedded PostgreSQL: `kill -9` of a server's parent leaves the server running, so its
//! parent is this one, which waits for its stdin to end and then stops the server and removes its data. Meanwhile it lets
//! the server crash and recover when it is asked to.

use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::{Gid, Uid};
use postgresql_embedded::{PostgreSQL, Settings, Status, VersionReq};
use tokio::process::Command;

use crate::{
    owner::{Owned, obey},
    ports::Reserved,
    postgres::{Started, UNPRIVILEGED},
};

/// zonky's builds on Maven Central; the crate knows the address by this name.
const RELEASES: &str = "https://github.com/zonkyio/embedded-postgres-binaries";
const VERSION: &str = "=17.5.0";
/// initdb with fsync takes more than the crate's 5 s on a busy machine.
const COMMAND_BOUND: Duration = Duration::from_secs(60);

/// In the file, and not with the others on the command line, which ALTER SYSTEM does not win against.
const CHANGEABLE: &[u8] = b"pg_stat_statements.track = none\npg_stat_statements.save = off\n";

/// Runs until stdin ends. The one argument pair is the folder for the data, removed at the end, and the one for the
/// server's programs, kept.
pub fn run(dir: &Path, install: &Path) -> Result<()> {
    take_unprivileged_uid()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(own(dir, install));
    // the thread that reads stdin may still wait there
    runtime.shutdown_background();
    let removed = std::fs::remove_dir_all(dir).context("remove the data");
    outcome.and(removed)
}

/// As root, becomes `nobody` for good. Here and not in the parent's `Command::uid`, because that uid may not be allowed to
/// execute this file, below a home of mode 0700, say.
fn take_unprivileged_uid() -> Result<()> {
    if Uid::effective().is_root() {
        let gid = Gid::from_raw(UNPRIVILEGED);
        nix::unistd::setgroups(&[gid]).context("give groups up")?;
        nix::unistd::setgid(gid).context("give the root group up")?;
        nix::unistd::setuid(Uid::from_raw(UNPRIVILEGED)).context("give root up")?;
    }
    Ok(())
}

async fn own(dir: &Path, install: &Path) -> Result<()> {
    // the crate would pick a port, let go of it before the server takes it, and again with each restart
    let port = Reserved::any()?;
    let mut server = PostgreSQL::new(settings(dir, install, port.address().port())?);
    server
        .setup()
        .await
        .context("set PostgreSQL up (the first run downloads it from Maven Central)")?;
    let settings = server.settings().data_dir.join("postgresql.conf");
    let mut settings = File::options().append(true).open(settings)?;
    settings.write_all(CHANGEABLE).context("write settings")?;
    let mut server = Database(server);
    server.recover().await?;
    let started = Started {
        url: server.0.settings().url("postgres"),
    };
    let obeyed = obey(&mut server, &started).await;
    // a crash that was asked for last leaves nothing to stop
    if server.0.status() == Status::Started {
        server.0.stop().await.context("stop PostgreSQL")?;
    }
    obeyed
}

struct Database(PostgreSQL);

impl Owned for Database {
    /// Immediate mode: no checkpoint, every connection cut off; the next start replays the log.
    async fn crash(&mut self) -> Result<()> {
        let settings = self.0.settings();
        let ended = Command::new(settings.binary_dir().join("pg_ctl"))
            .args(["stop", "--mode=immediate", "--wait", "--silent", "--pgdata"])
            .arg(&settings.data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .await
            .context("run pg_ctl")?;
        ensure!(ended.success(), "pg_ctl stop: {ended}");
        Ok(())
    }

    async fn recover(&mut self) -> Result<()> {
        let started = self.0.start().await;
        started.with_context(|| {
            let log = self.0.settings().data_dir.join("start.log");
            let log = std::fs::read_to_string(log).unwrap_or_default();
            format!("start PostgreSQL, whose log ends with\n{log}")
        })
    }
}

/// Spelled out whole: `Settings::default()` leaves two temporary folders behind.
fn settings(dir: &Path, install: &Path, port: u16) -> Result<Settings> {
    let password = read_or_make_password(&dir.join("password"))?;
    let configuration = [
        // the crate starts the server with -F; the later option wins
        ("fsync", "on"),
        // six test stacks at once, three services with pools each
        ("max_connections", "300"),
        // the default, 128 MB, is less than the tables of a load: its reads would be of the system's cache
        ("shared_buffers", "512MB"),
        // after a crash one call, in place of one for each of a thousand files
        ("recovery_init_sync_method", "syncfs"),
        ("listen_addresses", "127.0.0.1"),
        // no socket files: TCP is all that is used
        ("unix_socket_directories", ""),
        // for a load that asks what its statements cost; until then both watch nothing
        (
            "shared_preload_libraries",
            "pg_stat_statements,auto_explain",
        ),
    ];
    Ok(Settings {
        releases_url: RELEASES.to_owned(),
        version: VersionReq::parse(VERSION)?,
        installation_dir: install.to_owned(),
        password_file: dir.join("password"),
        data_dir: dir.join("data"),
        host: "127.0.0.1".to_owned(),
        port,
        username: "postgres".to_owned(),
        password,
        temporary: false,
        timeout: Some(COMMAND_BOUND),
        configuration: HashMap::from(
            configuration.map(|(key, value)| (key.to_owned(), value.to_owned())),
        ),
        trust_installation_dir: false,
        socket_dir: None,
    })
}

fn read_or_make_password(file: &PathBuf) -> Result<String> {
    if !file.exists() {
        std::fs::write(file, uuid::Uuid::new_v4().simple().to_string())
            .context("write the password")?;
    }
    std::fs::read_to_string(file).context("read the password")
}

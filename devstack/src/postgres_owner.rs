//! The child process that owns an embedded PostgreSQL: `kill -9` of a server's parent leaves the server running, so its
//! parent is this one, which does nothing but wait for its stdin to end and then stop the server and remove its data.

use std::{
    collections::HashMap,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::unistd::{Gid, Uid};
use postgresql_embedded::{PostgreSQL, Settings, VersionReq};
use tokio::{io::AsyncReadExt as _, signal::unix::SignalKind};

use crate::postgres::{Started, UNPRIVILEGED};

/// zonky's builds on Maven Central; the crate knows the address by this name.
const RELEASES: &str = "https://github.com/zonkyio/embedded-postgres-binaries";
const VERSION: &str = "=17.5.0";
/// initdb with fsync takes more than the crate's 5 s on a busy machine.
const COMMAND_BOUND: Duration = Duration::from_secs(60);
/// The crate picks a free port and lets go of it before the server takes it: another may be faster.
const ATTEMPTS: usize = 3;

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
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let server = start(dir, install).await?;
    let started = Started {
        url: server.settings().url("postgres"),
    };
    println!("{}", serde_json::to_string(&started)?);
    std::io::stdout().flush()?;
    let mut rest = Vec::new();
    let mut stdin = tokio::io::stdin();
    tokio::select! {
        _ = stdin.read_to_end(&mut rest) => {}
        _ = terminate.recv() => {}
    }
    server.stop().await.context("stop PostgreSQL")
}

async fn start(dir: &Path, install: &Path) -> Result<PostgreSQL> {
    let mut server = PostgreSQL::new(settings(dir, install)?);
    server
        .setup()
        .await
        .context("set PostgreSQL up (the first run downloads it from Maven Central)")?;
    for attempt in 1.. {
        let Err(error) = server.start().await else {
            break;
        };
        if attempt == ATTEMPTS {
            let log = std::fs::read_to_string(dir.join("data/start.log")).unwrap_or_default();
            return Err(error)
                .with_context(|| format!("start PostgreSQL, whose log ends with\n{log}"));
        }
        server = PostgreSQL::new(settings(dir, install)?);
        server.setup().await.context("set PostgreSQL up again")?;
    }
    Ok(server)
}

/// Spelled out whole: `Settings::default()` leaves two temporary folders behind.
fn settings(dir: &Path, install: &Path) -> Result<Settings> {
    let password = read_or_make_password(&dir.join("password"))?;
    let configuration = [
        // the crate starts the server with -F; the later option wins
        ("fsync", "on"),
        // six test stacks at once, three services with pools each
        ("max_connections", "300"),
        ("listen_addresses", "127.0.0.1"),
        // no socket files: TCP is all that is used
        ("unix_socket_directories", ""),
    ];
    Ok(Settings {
        releases_url: RELEASES.to_owned(),
        version: VersionReq::parse(VERSION)?,
        installation_dir: install.to_owned(),
        password_file: dir.join("password"),
        data_dir: dir.join("data"),
        host: "127.0.0.1".to_owned(),
        port: 0,
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

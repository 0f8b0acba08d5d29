//! A service as a process: exit codes, the signals that stop it, the line that says where it listens.

use std::{
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use clap::Args;
use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tracing::Level;

use crate::{
    command::{EXIT_UNAVAILABLE, Unavailable},
    error::StartError,
    log,
};

/// Of every process that links this crate: a call makes and frees hundreds of small things, on every thread.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The arguments that every command of a service takes.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArgs {
    /// The config file [default: ./config.yaml]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
}

/// The arguments of `serve`.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// Stop when stdin reaches its end, so that the process cannot outlive the one that started it
    #[arg(long)]
    pub stop_on_stdin_close: bool,
}

/// Exit code for a configuration or start problem: EX_USAGE of sysexits.h.
pub const EXIT_CONFIG: u8 = 64;

/// Runs a command to its end. A [`StartError`] is one line on stderr and exit code 64, [`Unavailable`] exit code 69, any
/// other error exit code 1.
pub fn main<F: Future<Output = anyhow::Result<ExitCode>>>(
    service: &'static str,
    command: impl FnOnce() -> F,
) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{service}: starting the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(command());
    // a blocking read of stdin never ends by itself
    runtime.shutdown_timeout(Duration::from_millis(100));
    let code = exit_code(service, ended);
    log::flush();
    code
}

/// Says on stderr why it failed.
fn exit_code(service: &str, ended: anyhow::Result<ExitCode>) -> ExitCode {
    match ended {
        Ok(code) => code,
        Err(error) => {
            log::STDERR.write(Level::ERROR, format!("{service}: {error:#}"));
            if error.downcast_ref::<StartError>().is_some() {
                ExitCode::from(EXIT_CONFIG)
            } else if error.downcast_ref::<Unavailable>().is_some() {
                ExitCode::from(EXIT_UNAVAILABLE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Says on stdout, as one JSON line, where the doors are: port 0 in the config means any.
pub fn announce(service: &str, addresses: &[(&'static str, SocketAddr)]) {
    let mut line = json!({"service": service});
    for (name, address) in addresses {
        line[*name] = address.to_string().into();
    }
    log::STDOUT.write(Level::ERROR, line.to_string());
}

/// What a signal does that is not the first.
struct Second {
    /// The process serves on for a while: it stops now.
    ends_delay: Notify,
    is_delayed: AtomicBool,
}

static SECOND: Second = Second {
    ends_delay: Notify::const_new(),
    is_delayed: AtomicBool::new(false),
};

/// Resolves on a second signal, which then ends a delay and not the process.
pub(crate) async fn hurried() {
    /// Once nobody waits for it any more, a second signal exits.
    struct Delayed;
    impl Drop for Delayed {
        fn drop(&mut self) {
            SECOND.is_delayed.store(false, Ordering::SeqCst);
        }
    }
    SECOND.is_delayed.store(true, Ordering::SeqCst);
    let _delayed = Delayed;
    SECOND.ends_delay.notified().await;
}

/// Resolves on SIGTERM, SIGINT or, if asked, the end of stdin. A second signal exits at once, or
/// ends `shutdown_delay`.
///
/// # Errors
/// Signal handlers could not be installed.
pub fn shutdown_signal(stop_on_stdin_close: bool) -> std::io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = stdin_closed(), if stop_on_stdin_close => {}
        }
        crate::tasks::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            if SECOND.is_delayed.load(Ordering::SeqCst) {
                SECOND.ends_delay.notify_one();
                tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            }
            log::STDERR.write(
                Level::ERROR,
                "stopped at once by a second signal".to_owned(),
            );
            log::flush();
            std::process::exit(130);
        });
    })
}

/// Starts something unless `shutdown` comes first, which answers none: a database that says nothing must not hold a process
/// that was told to go.
///
/// # Errors
/// The start's own.
pub async fn start<T, E>(
    shutdown: impl Future<Output = ()>,
    start: impl Future<Output = Result<T, E>>,
) -> Result<Option<T>, E> {
    tokio::select! {
        // a start that is done is not thrown away
        biased;
        started = start => started.map(Some),
        () = shutdown => Ok(None),
    }
}

async fn stdin_closed() {
    let (mut stdin, mut buffer) = (tokio::io::stdin(), [0_u8; 256]);
    while !matches!(stdin.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

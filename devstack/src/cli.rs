//! The commands.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use crate::{
    binaries::Binaries,
    certs, demo,
    failure::{self, Interrupted},
    postgres::{self, Server},
    postgres_owner,
    products::{self, StandIn},
    replay, retail,
    signals::Stop,
    up,
};

/// The local stack of the order system: starts it, walks through it, replays real orders on it.
#[derive(Parser)]
#[command(name = "devstack", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Walk a purchase and all its refusals through a stack of its own, checking each step
    Demo(BuildArgs),
    /// Run the stack on the contract's ports until Ctrl-C
    Up(BuildArgs),
    /// Play a folder of real orders through a stack of its own and compare what comes out
    Replay(ReplayArgs),
    /// Write development certificates, unless a valid set is there
    Certs(CertsArgs),
    /// Run the stand-in for ProductService
    Products(ProductsArgs),
    /// Run an embedded PostgreSQL, for a command or until Ctrl-C
    Pg(PgArgs),
    /// The process that owns the embedded PostgreSQL
    #[command(hide = true)]
    PgOwner { dir: PathBuf, install: PathBuf },
}

#[derive(Args)]
struct BuildArgs {
    /// Start the services as they are, without `cargo build`
    #[arg(long)]
    no_build: bool,
}

#[derive(Args)]
struct ReplayArgs {
    /// A folder with products.csv, stock.csv, orders.csv and expected.json
    dir: PathBuf,
    /// Which way the orders take
    #[arg(long, value_enum)]
    through: replay::Way,
    /// Shoppers at once; with 1 the result must equal expected.json
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=512))]
    concurrency: u16,
    /// Write the JSON here too
    #[arg(long)]
    json: Option<PathBuf>,
    #[command(flatten)]
    build: BuildArgs,
}

#[derive(Args)]
struct CertsArgs {
    /// Where they go
    #[arg(long, default_value = "certs")]
    dir: PathBuf,
    /// Write new ones over those that are there
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct ProductsArgs {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:50054")]
    listen: SocketAddr,
    /// A products.csv; the retail catalogue without
    #[arg(long)]
    catalogue: Option<PathBuf>,
    /// The token that requests must carry
    #[arg(long, default_value = products::TOKEN)]
    token: String,
    /// Requests in any second
    #[arg(long, default_value_t = products::Limits::default().per_second)]
    per_second: usize,
    /// Requests at the same time
    #[arg(long, default_value_t = products::Limits::default().at_once)]
    at_once: usize,
    /// Milliseconds to take for an answer
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Certificate; plaintext without
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

#[derive(Args)]
struct PgArgs {
    /// Print nothing but the URL
    #[arg(long)]
    url_only: bool,
    /// Run this with DATABASE_URL set, then stop the server and exit with its code
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // nothing can be done about a closed stderr
            let _ = error.print();
            return if error.use_stderr() {
                failure::usage()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if let Command::PgOwner { dir, install } = command {
        // gives root up, which must happen before there is a second thread
        return postgres_owner::run(&dir, &install).map(|()| ExitCode::SUCCESS);
    }
    crate::clients::install_tls_provider();
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    let outcome = runtime.block_on(dispatch(command));
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(binaries(&args).await?).await?,
        Command::Up(args) => up::run(binaries(&args).await?).await?,
        Command::Replay(args) => {
            let binaries = binaries(&args.build).await?;
            let plan = replay::Plan {
                dir: args.dir,
                way: args.through,
                concurrency: args.concurrency.into(),
                json: args.json,
            };
            replay::run(&plan, binaries).await?;
        }
        Command::Certs(args) => write_certs(&args)?,
        Command::Products(args) => serve_products(args).await?,
        Command::Pg(args) => return pg(args).await,
        Command::PgOwner { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn binaries(args: &BuildArgs) -> Result<Binaries> {
    let binaries = Binaries::beside_me()?;
    if !args.no_build {
        binaries.build().await?;
    }
    Ok(binaries)
}

fn write_certs(args: &CertsArgs) -> Result<()> {
    let dir = args.dir.display();
    match certs::ensure(&args.dir, args.force)? {
        certs::Outcome::Written => println!(
            "wrote ca.pem and certificates for {} to {dir}",
            certs::SERVERS.join(", ")
        ),
        certs::Outcome::Kept => println!("{dir} has a valid set; --force writes a new one"),
    }
    Ok(())
}

async fn serve_products(args: ProductsArgs) -> Result<()> {
    let catalogue = match &args.catalogue {
        Some(file) => retail::read_file::<retail::Product>(file)?
            .into_iter()
            .map(|p| (p.sku, p))
            .collect(),
        None => retail::catalogue(retail::PRODUCTS_CSV)?,
    };
    let products = catalogue.len();
    let mut stop = Stop::listen()?;
    let stand_in = StandIn::start(products::Options {
        listen: args.listen,
        catalogue,
        token: args.token,
        limits: products::Limits {
            per_second: args.per_second,
            at_once: args.at_once,
        },
        latency: Duration::from_millis(args.latency_ms),
        tls: args.tls_cert.zip(args.tls_key),
    })
    .await?;
    println!(
        "ProductService with {products} products on {}",
        stand_in.address()
    );
    stop.asked().await;
    stop.impatient(stand_in.stop()).await
}

async fn pg(args: PgArgs) -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let devstack = std::env::current_exe().context("find devstack's own executable")?;
    let server = stop.interrupts(Server::start(&devstack)).await?;
    let outcome = match args.command.split_first() {
        Some((program, arguments)) => {
            postgres::run_with(&server, program, arguments, &mut stop).await
        }
        None => {
            println!("{}", server.url());
            if !args.url_only {
                println!(
                    "PostgreSQL until Ctrl-C; with DATABASE_URL set to this, tests and devstack use it"
                );
            }
            stop.asked().await;
            Ok(ExitCode::SUCCESS)
        }
    };
    let stopped = stop.impatient(server.stop()).await;
    match outcome {
        Err(error) if error.is::<Interrupted>() => Err(error),
        outcome => outcome.and_then(|code| stopped.map(|()| code)),
    }
}

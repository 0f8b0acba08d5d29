//! The commands.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use crate::{
    bench,
    binaries::Binaries,
    certs, chaos, demo,
    failure::{self, Interrupted, code_after_cleanup},
    kafka::{Kafka, Tools},
    kafka_owner, load, mock_owner,
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
    /// Put load on a stack of its own while everything in it is killed now and then, and recount what is left
    Chaos(ChaosArgs),
    /// Measure how fast it is
    Load {
        #[command(subcommand)]
        what: load::What,
    },
    /// What the database alone can do with the writes of CreateOrder, to hold a load's figure against
    Ceiling(load::Plan),
    /// Run the standard loads and write a page of what came out
    Bench(BenchArgs),
    /// Write development certificates, unless a valid set is there
    Certs(CertsArgs),
    /// Run the stand-in for ProductService
    Products(ProductsArgs),
    /// Run an embedded PostgreSQL, for a command or until Ctrl-C
    Pg(PgArgs),
    /// Run an Apache Kafka from Maven Central, for a command or until Ctrl-C
    Kafka(KafkaArgs),
    /// The process that owns the embedded PostgreSQL
    #[command(hide = true)]
    PgOwner { dir: PathBuf, install: PathBuf },
    /// The process that owns the Apache Kafka
    #[command(hide = true)]
    KafkaOwner {
        dir: PathBuf,
        libs: PathBuf,
        port: u16,
        controller_port: u16,
    },
    /// The process that holds the mock cluster
    #[command(hide = true)]
    MockOwner {
        orders: String,
        dead_letters: String,
    },
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
struct BenchArgs {
    /// How long each load is measured
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// The page
    #[arg(long, default_value = "docs/benchmarks.md")]
    page: PathBuf,
    #[command(flatten)]
    build: BuildArgs,
}

#[derive(Args)]
struct ChaosArgs {
    /// How long there are load and faults
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// What decides the moments of the faults and the choices of the callers [default: any]
    #[arg(long)]
    seed: Option<u64>,
    /// Write the figures and findings here, as JSON
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
    /// A folder for each owner, with the authority and its own key only
    #[arg(long)]
    apart: bool,
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

#[derive(Args)]
struct KafkaArgs {
    /// Run this with KAFKA_BROKERS set, then stop the broker and exit with its code
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
    // the owners make runtimes of their own; the first one gives root up, which must happen before there is a second thread
    match &command {
        Command::PgOwner { dir, install } => {
            return postgres_owner::run(dir, install).map(|()| ExitCode::SUCCESS);
        }
        Command::KafkaOwner {
            dir,
            libs,
            port,
            controller_port,
        } => {
            let owned = kafka_owner::run(dir, libs, *port, *controller_port);
            return owned.map(|()| ExitCode::SUCCESS);
        }
        Command::MockOwner {
            orders,
            dead_letters,
        } => return mock_owner::run(orders, dead_letters).map(|()| ExitCode::SUCCESS),
        _ => {}
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
        Command::Chaos(args) => {
            let binaries = binaries(&args.build).await?;
            let order = chaos::Order {
                seconds: args.seconds,
                // short enough to be typed
                seed: args
                    .seed
                    .unwrap_or_else(|| rand::random_range(1..1_000_000)),
                json: args.json,
            };
            return chaos::run(&order, binaries).await;
        }
        Command::Bench(args) => {
            let binaries = binaries(&args.build).await?;
            bench::run(args.seconds, &args.page, &binaries).await?;
        }
        Command::Ceiling(plan) => {
            let binaries = binaries(&BuildArgs {
                no_build: plan.no_build,
            })
            .await?;
            load::run(&load::What::Ceiling(plan), Some(binaries)).await?;
        }
        Command::Load { what } => {
            let build = BuildArgs {
                no_build: what.plan().no_build,
            };
            // another's server needs none of ours
            let binaries = match what.plan().addr {
                Some(_) => None,
                None => Some(binaries(&build).await?),
            };
            load::run(&what, binaries).await?;
        }
        Command::Certs(args) => write_certs(&args)?,
        Command::Products(args) => serve_products(args).await?,
        Command::Pg(args) => return pg(args).await,
        Command::Kafka(args) => return kafka(args).await,
        Command::PgOwner { .. } | Command::KafkaOwner { .. } | Command::MockOwner { .. } => {}
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
    let layout = if args.apart {
        certs::Layout::Apart
    } else {
        certs::Layout::Together
    };
    match certs::ensure(&args.dir, layout, args.force)? {
        certs::Outcome::Written => println!(
            "wrote ca.pem and certificates for {} to {dir}",
            certs::owners().collect::<Vec<_>>().join(", ")
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
    let starting = Server::start(&devstack, postgres::Source::Environment);
    let mut server = stop.interrupts(starting).await?;
    let outcome = match args.command.split_first() {
        Some((program, arguments)) => {
            let run = server.begin_tests();
            let variables = [("DATABASE_URL", server.admin_url()), (postgres::RUN, &run)];
            stop.run_with(&variables, program, arguments).await
        }
        None => {
            println!("{}", server.admin_url());
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
        outcome => code_after_cleanup(outcome, stopped),
    }
}

async fn kafka(args: KafkaArgs) -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let devstack = std::env::current_exe().context("find devstack's own executable")?;
    let tools = stop.interrupts(Tools::find()).await?;
    let kafka = stop.interrupts(Kafka::start(&devstack, &tools)).await?;
    let address = kafka.address();
    eprintln!("Apache Kafka {} listens on {address}", tools.version());
    let outcome = match args.command.split_first() {
        Some((program, arguments)) => {
            let variables = [("KAFKA_BROKERS", address.as_str())];
            stop.run_with(&variables, program, arguments).await
        }
        None => {
            println!("{address}");
            stop.asked().await;
            Ok(ExitCode::SUCCESS)
        }
    };
    let stopped = stop.impatient(kafka.stop()).await;
    code_after_cleanup(outcome, stopped)
}

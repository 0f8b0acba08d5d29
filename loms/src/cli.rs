//! `loms serve|migrate|import|stock receive|audit`.

use std::{path::PathBuf, pin::pin, process::ExitCode};

use clap::{Parser, Subcommand};
use loms::{App, Config};
use platform::{
    command::{self, Access, WaitArgs},
    config,
    import::ImportArgs,
    process::{self, ConfigArgs, ServeArgs},
    telemetry,
};

/// Stock by warehouse, orders, reservations, payment and cancellation.
#[derive(Parser)]
#[command(name = "loms", version)]
pub(crate) struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve gRPC and HTTP (what is done without a command)
    Serve(ServeArgs),
    /// Bring the schema `loms` up to date, while the service works on it
    Migrate(WaitArgs),
    /// Take over orders and stock of the system before, from its tables in `public`
    Import(ImportArgs),
    /// Stock that arrives
    Stock {
        #[command(subcommand)]
        command: StockCommand,
    },
    /// Recount everything from the tables; exit code 1 if anything differs
    Audit(WaitArgs),
}

#[derive(Subcommand)]
enum StockCommand {
    /// Book a CSV file with the header warehouse_id,sku,count: all lines or none, the same delivery once
    Receive {
        file: PathBuf,
        /// The delivery's id [default: the file's name and content]
        #[arg(long)]
        delivery: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let config: Config = config::load(cli.config.config.as_deref())?;
    match cli.command.unwrap_or(Command::Serve(ServeArgs::default())) {
        Command::Serve(args) => serve(config, args).await?,
        Command::Migrate(WaitArgs { wait }) => loms::migrate(&config, wait).await?,
        Command::Import(args) => println!("{}", import(&config, &args).await?),
        Command::Stock {
            command:
                StockCommand::Receive {
                    file,
                    delivery,
                    wait: WaitArgs { wait },
                },
        } => {
            let received = loms::receive_file(&config, &file, delivery, wait).await?;
            println!("{received}");
        }
        Command::Audit(WaitArgs { wait }) => {
            command::wait_for_database(&config.postgres, "loms-audit", Access::Read, wait).await?;
            let report = loms::audit(&config).await?;
            println!("{report}");
            return Ok(if report.differences.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn import(config: &Config, args: &ImportArgs) -> anyhow::Result<String> {
    #[cfg(feature = "failpoints")]
    let _crash_points = fail::FailScenario::setup();
    loms::import(config, args).await
}

async fn serve(config: Config, args: ServeArgs) -> anyhow::Result<()> {
    #[cfg(feature = "failpoints")]
    let _crash_points = fail::FailScenario::setup();
    let telemetry = telemetry::init("loms", &config.log, &config.jaeger, &config.graylog)?;
    let mut shutdown = pin!(process::shutdown_signal(args.stop_on_stdin_close)?);
    let Some(app) = process::start(shutdown.as_mut(), App::bind(config)).await? else {
        telemetry.shutdown().await;
        return Ok(());
    };
    process::announce("loms", &app.addresses());
    let ended = app.run(shutdown).await;
    telemetry.shutdown().await;
    ended
}

//! `checkout serve|migrate|import`.

use std::process::ExitCode;

use checkout::{app, import::import};
use clap::{Parser, Subcommand};
use platform::{
    command::WaitArgs,
    config::load,
    import::ImportArgs,
    process::{ConfigArgs, ServeArgs},
};

/// A user's cart, and the purchase.
#[derive(Parser)]
#[command(name = "checkout", version)]
pub(crate) struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until stopped (the default)
    Serve(ServeArgs),
    /// Bring the database's schema up to date, while the service works on it
    Migrate(WaitArgs),
    /// Take over the carts of the system before, from its tables in `public`
    Import(ImportArgs),
}

pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let config = load(cli.config.config.as_deref())?;
    match cli.command.unwrap_or(Command::Serve(ServeArgs::default())) {
        Command::Serve(args) => app::serve(config, args.stop_on_stdin_close).await?,
        Command::Migrate(WaitArgs { wait }) => app::migrate(&config, wait).await?,
        Command::Import(args) => println!("{}", import(&config, &args).await?),
    }
    Ok(ExitCode::SUCCESS)
}

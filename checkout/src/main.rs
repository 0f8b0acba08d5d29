//! The command line of checkout.

use std::process::ExitCode;

use checkout::app::{self, SERVICE};
use clap::{Parser, Subcommand};
use platform::command::WaitArgs;
use platform::config::load;
use platform::process::{self, ConfigArgs, ServeArgs};

/// A user's cart, and the purchase.
#[derive(Parser)]
#[command(version)]
struct Cli {
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
}

fn main() -> ExitCode {
    let Cli { config, command } = Cli::parse();
    process::main(SERVICE, async || {
        let config = load(config.config.as_deref())?;
        match command.unwrap_or(Command::Serve(ServeArgs::default())) {
            Command::Serve(args) => app::serve(config, args.stop_on_stdin_close).await?,
            Command::Migrate(WaitArgs { wait }) => app::migrate(&config, wait).await?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

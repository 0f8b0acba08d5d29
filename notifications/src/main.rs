//! The command line of the notifications service.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use notifications::app::{self, SERVICE};
use platform::{
    config::load,
    process::{self, ConfigArgs, ServeArgs},
};

/// Consumes order events, tells people, keeps the history.
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
    /// Bring the database's schema up to date
    Migrate,
}

fn main() -> ExitCode {
    let Cli { config, command } = Cli::parse();
    process::main(SERVICE, async || {
        let config = load(config.config.as_deref())?;
        match command.unwrap_or(Command::Serve(ServeArgs::default())) {
            Command::Serve(args) => app::serve(config, args.stop_on_stdin_close).await?,
            Command::Migrate => app::migrate(&config).await?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

//! `notifications serve|migrate|import|dead-letters list|dead-letters replay`.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use notifications::{app, config::Config, import::import, listing, replay};
use platform::{
    command::WaitArgs,
    config::load,
    import::ImportArgs,
    process::{ConfigArgs, ServeArgs},
};

/// Consumes order events, tells people, keeps the history.
#[derive(Parser)]
#[command(version)]
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
    /// Take over the messages of the system before, from its table in `public`
    Import(ImportArgs),
    /// What could not be saved
    DeadLetters {
        #[command(subcommand)]
        command: DeadLettersCommand,
    },
}

#[derive(Subcommand)]
enum DeadLettersCommand {
    /// Show the letters that wait to be put back, the oldest first
    List(ListArgs),
    /// Put the letters that wait back to where they were read, each once; what is still poison comes back as a new letter
    Replay {
        /// At most so many [default: all that wait]
        #[arg(long)]
        limit: Option<u64>,
    },
}

#[derive(Args)]
struct ListArgs {
    /// At most so many
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Those put back before, too, as long as the topic has them
    #[arg(long)]
    all: bool,
    /// A JSON object a line, whole values
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let config = load(cli.config.config.as_deref())?;
    match cli.command.unwrap_or(Command::Serve(ServeArgs::default())) {
        Command::Serve(args) => app::serve(config, args.stop_on_stdin_close).await?,
        Command::Migrate(WaitArgs { wait }) => app::migrate(&config, wait).await?,
        Command::Import(args) => println!("{}", import(&config, &args).await?),
        Command::DeadLetters { command } => match command {
            DeadLettersCommand::List(args) => list(&config, &args).await?,
            DeadLettersCommand::Replay { limit } => {
                let replayed = replay::replay(&config, limit.unwrap_or(u64::MAX)).await?;
                println!("{replayed}");
            }
        },
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let listing = listing::list(config, args.all, args.limit).await?;
    if let Some(why) = &listing.without_topic {
        eprintln!("notifications: only letters with rows are shown: {why}");
    }
    for letter in &listing.letters {
        if args.json {
            println!("{}", serde_json::to_string(letter)?);
        } else {
            println!("{letter}");
        }
    }
    if !args.json {
        println!(
            "{} of {} dead letters",
            listing.letters.len(),
            listing.total
        );
    }
    Ok(())
}

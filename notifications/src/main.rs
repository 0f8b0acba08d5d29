//! The command line of the notifications service.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;
use notifications::app::SERVICE;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    platform::process::main(SERVICE, || cli::run(command))
}

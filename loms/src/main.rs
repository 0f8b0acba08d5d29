//! The command line of LOMS.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    platform::process::main("loms", || cli::run(command))
}

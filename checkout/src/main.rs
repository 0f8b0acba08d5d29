//! The command line of checkout.

mod cli;

use std::process::ExitCode;

use checkout::app::SERVICE;
use clap::Parser as _;
use platform::process;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    process::main(SERVICE, || cli::run(command))
}

//! The command line of the local stack; what each command does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    devstack::cli::main()
}

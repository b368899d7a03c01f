//! The command line for people.

use std::process::ExitCode;

fn main() -> ExitCode {
    liveblk::cli::run(std::env::args_os())
}

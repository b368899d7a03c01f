//! The command line for people: `liveblk`.
//!
//! It stands on top of everything: `serve` is the daemon with a configuration made here, the commands
//! for a running daemon speak QMP over its socket as any client does, and `image` opens images in this
//! process. It holds no logic of its own about images or graphs.
//!
//! Invariants:
//! - stdout carries only a command's result; every error is one line on stderr, `liveblk: …`; the progress
//!   of a job that is waited for goes there, too.
//! - Exit status 0: done; 1: failed; 2: wrong command line; `image check` has further ones;
//!   130: no longer waiting for a job, which goes on.

mod args;
mod backup;
mod backup_args;
mod bitmap;
mod bitmap_args;
mod block_graph;
mod chain;
mod chain_job;
mod device_name;
mod endpoint;
mod fleece;
mod format;
mod image;
mod image_args;
mod job_args;
mod job_progress;
mod job_view;
mod job_wait;
mod jobs;
mod mirror;
mod names;
mod picture;
mod qmp_client;
mod qmp_command;
mod serve;
mod size;
mod snapshot;
mod verify;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::error::{Error, Result};

pub use args::command;
use args::{Arguments, Command};

/// Exit status of a wrong command line.
const USAGE: u8 = 2;

/// What a command gives: its result for stdout and the exit status.
struct Outcome {
    text: String,
    status: u8,
}

impl Outcome {
    fn text(text: String) -> Outcome {
        Outcome { text, status: 0 }
    }
}

/// Runs `liveblk` with these arguments, the program's name first.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => execute(arguments.command),
        Err(error) => refuse(&error),
    }
}

fn execute(command: Command) -> ExitCode {
    match command {
        Command::Serve(arguments) => serve::run(&arguments).unwrap_or_else(|error| fail(&error)),
        Command::Snapshot(arguments) => finish(snapshot::run(&arguments)),
        Command::Bitmap(command) => finish(bitmap::run(&command)),
        Command::Chain(arguments) => finish(chain::run(&arguments)),
        Command::Stream(arguments) => finish(chain_job::stream(&arguments)),
        Command::Commit(arguments) => finish(chain_job::commit(&arguments)),
        Command::Mirror(arguments) => finish(mirror::run(&arguments)),
        Command::Backup(arguments) => finish(backup::run(&arguments)),
        Command::Checkpoint(arguments) => finish(backup::checkpoint(&arguments)),
        Command::Jobs(arguments) => finish(jobs::list(&arguments)),
        Command::Job(command) => finish(jobs::run(&command)),
        Command::DeviceName(arguments) => finish(device_name::run(&arguments)),
        Command::Image(command) => finish(image::run(&command)),
        Command::Qmp(arguments) => finish(qmp_command::run(&arguments)),
    }
}

fn finish(result: Result<Outcome>) -> ExitCode {
    let written = result.and_then(|outcome| {
        let mut stdout = io::stdout().lock();
        stdout.write_all(outcome.text.as_bytes())?;
        stdout.flush()?;
        Ok(outcome.status)
    });
    match written {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("liveblk: {error}");
    ExitCode::FAILURE
}

/// `--help` and `--version` go to stdout; a wrong command line is an error in our own form.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    if !error.use_stderr() {
        return finish(Ok(Outcome::text(text)));
    }
    match text.strip_prefix("error: ") {
        Some(text) => eprint!("liveblk: {text}"),
        None => eprint!("{text}"), // the short help, where the command is missing
    }
    ExitCode::from(USAGE)
}

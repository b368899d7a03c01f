//! `liveblk image`: create, describe and check images that no daemon serves, and their internal snapshots.
//!
//! Results have the shape of qemu-img's, in text and in JSON. Nothing is repaired here and nothing
//! opened but the images named and their backing files: for a new overlay's size, and where a chain is asked for.

mod check;
mod create;
mod info;
mod opened;
mod options;
mod snapshot;
mod snapshot_list;

use crate::error::Result;
use crate::runtime::{Config, Runtime};

use super::Outcome;
use super::image_args::ImageCommand;

pub(super) fn run(command: &ImageCommand) -> Result<Outcome> {
    let runtime = Runtime::new(&Config::default())?;
    let handle = runtime.handle();
    match command {
        ImageCommand::Create(arguments) => runtime.block_on(create::run(&handle, arguments)),
        ImageCommand::Info(arguments) => runtime.block_on(info::run(&handle, arguments)),
        ImageCommand::Check(arguments) => runtime.block_on(check::run(&handle, arguments)),
        ImageCommand::Snapshot(arguments) => runtime.block_on(snapshot::run(&handle, arguments)),
    }
}

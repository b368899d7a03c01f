//! `liveblk image snapshot`: the internal snapshots of an image that nobody uses.

use std::time::SystemTime;

use crate::block::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::snapshot_table::read_snapshots;
use crate::format::qcow2::{OpenOptions, Qcow2};
use crate::qmp::commands::date_of;
use crate::runtime::Handle;

use super::super::Outcome;
use super::super::args::Output;
use super::super::format::Format;
use super::super::image_args::ImageSnapshotArguments;
use super::opened::{Access, Opened, text_of};
use super::snapshot_list;

/// What is to be changed.
enum Change<'a> {
    Create(&'a str),
    Apply(&'a str),
    Delete(&'a str),
}

impl<'a> Change<'a> {
    fn of(arguments: &'a ImageSnapshotArguments) -> Option<Change<'a>> {
        let create = arguments.create.as_deref().map(Change::Create);
        let apply = arguments.apply.as_deref().map(Change::Apply);
        let delete = arguments.delete.as_deref().map(Change::Delete);
        create.or(apply).or(delete)
    }

    /// What went wrong, in qemu-img's words.
    fn failed(&self, error: Error) -> Error {
        let (verb, name) = match self {
            Change::Create(name) => ("create", name),
            Change::Apply(name) => ("apply", name),
            Change::Delete(name) => ("delete", name),
        };
        error.context(format!("Could not {verb} snapshot '{name}'"))
    }

    async fn make(&self, image: &Qcow2) -> Result<()> {
        match self {
            Change::Create(name) => {
                image
                    .create_snapshot(name, date_of(SystemTime::now()))
                    .await
            }
            Change::Apply(name) => image.apply_snapshot(find(image, name)?).await,
            Change::Delete(name) => image.delete_snapshot(find(image, name)?).await,
        }
    }
}

pub(super) async fn run(handle: &Handle, arguments: &ImageSnapshotArguments) -> Result<Outcome> {
    if arguments.image.format()? != Format::Qcow2 {
        let text = "This image format does not support internal snapshots";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    match Change::of(arguments) {
        None => list(handle, arguments).await,
        Some(change) => {
            let file = Opened::open(handle, &arguments.image.file, Access::Write).await?;
            let made = change_image(handle, &file, arguments, &change).await;
            let closed = file.close().await;
            made.map_err(|error| change.failed(error)).and(closed)?;
            Ok(Outcome::text(String::new()))
        }
    }
}

async fn list(handle: &Handle, arguments: &ImageSnapshotArguments) -> Result<Outcome> {
    let access = Access::to_read(arguments.force_share);
    let file = Opened::open(handle, &arguments.image.file, access).await?;
    let snapshots = read_snapshots(file.edge(), &file.header().await?).await?;
    file.close().await?;
    let mut text = String::new();
    match arguments.output {
        Output::Json => text = format!("{:#}\n", snapshot_list::json_of(&snapshots)),
        Output::Human if snapshots.is_empty() => {}
        // Writing to a string cannot fail.
        Output::Human => drop(snapshot_list::write(&snapshots, &mut text)),
    }
    Ok(Outcome::text(text))
}

async fn change_image(
    handle: &Handle,
    file: &Opened,
    arguments: &ImageSnapshotArguments,
    change: &Change<'_>,
) -> Result<()> {
    let options = OpenOptions {
        node_name: text_of(&arguments.image.file)?.to_owned(),
        helpers: Some(handle.clone()),
        ..OpenOptions::default()
    };
    let image = Qcow2::open(file.edge().clone(), options).await?;
    let made = change.make(&image).await;
    made.and(image.close().await)
}

/// The place of a snapshot in the table: by name, or else by id.
fn find(image: &Qcow2, given: &str) -> Result<usize> {
    let all = image.snapshots();
    let by_name = all.iter().position(|snapshot| snapshot.name == given);
    let found = by_name.or_else(|| all.iter().position(|snapshot| snapshot.id == given));
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "snapshot not found"))
}

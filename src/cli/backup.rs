//! `liveblk backup` and `liveblk checkpoint`: what a device holds at one moment, whole or on top of an
//! earlier backup.

use std::fs::remove_file;
use std::path::{Path, absolute};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

use super::backup_args::{BackupArguments, BackupCommand, BackupFile, CheckpointArguments};
use super::chain_job::{Started, common, text_of};
use super::format::Format;
use super::image_args::{CreateArguments, ImageCommand};
use super::job_args::ChainJobArguments;
use super::job_wait::Goal;
use super::snapshot::refuse_to_overwrite;
use super::{Outcome, fleece, image, verify};

pub(super) fn run(arguments: &BackupArguments) -> Result<Outcome> {
    if let Some(BackupCommand::Verify(arguments)) = &arguments.command {
        return verify::run(arguments);
    }
    let Some(file) = &arguments.file else {
        unreachable!("the command line has FILE, or a command");
    };
    if arguments.how.onto.is_some() && arguments.bitmap.is_none() {
        let text = "--onto needs --bitmap, which says what has changed since that backup";
        return Err(Error::refused(text));
    }
    let mut plan = Plan::new(&arguments.job, file, &arguments.how)?;
    let mut started = Started::connect(&arguments.job)?;
    let device = device(&started, arguments.target.as_deref())?;
    let mut before = Vec::new();
    if let Some(bitmap) = &arguments.bitmap {
        if plan.is_increment() {
            plan.set("sync", "incremental");
        } else if !started.has_bitmap(&device, bitmap)? {
            before.push(new_bitmap(&device, bitmap));
        }
        plan.set("bitmap", bitmap.as_str());
        plan.set("bitmap-mode", "on-success");
    }
    plan.carry_out(started, &device, &before)
}

pub(super) fn checkpoint(arguments: &CheckpointArguments) -> Result<Outcome> {
    let Some(file) = &arguments.file else {
        return fleece::release(arguments);
    };
    if arguments.fleece {
        return fleece::run(arguments, file);
    }
    if arguments.how.onto.is_some() && arguments.since.is_none() {
        let text = "--onto needs --since, the checkpoint of that backup";
        return Err(Error::refused(text));
    }
    let mut plan = Plan::new(&arguments.job, file, &arguments.how)?;
    let started = Started::connect(&arguments.job)?;
    let device = device(&started, arguments.target.as_deref())?;
    if let Some(since) = arguments.since.as_deref().filter(|_| plan.is_increment()) {
        plan.set("sync", "bitmap");
        plan.set("bitmap", since);
        // It is kept as what has changed between the two.
        plan.set("bitmap-mode", "never");
    }
    plan.carry_out(started, &device, &rotation(arguments, &device))
}

/// The actions on bitmaps that make a checkpoint.
pub(super) fn rotation(arguments: &CheckpointArguments, device: &str) -> Vec<Value> {
    let mut actions = vec![new_bitmap(device, &arguments.checkpoint)];
    if let Some(since) = &arguments.since {
        let data = json!({"node": device, "name": since});
        actions.push(json!({"type": "block-dirty-bitmap-disable", "data": data}));
    }
    actions
}

pub(super) fn device(started: &Started<'_>, target: Option<&str>) -> Result<String> {
    let chain = started.chain(target)?;
    Ok(chain.layers[0].node_name.clone())
}

fn new_bitmap(node: &str, name: &str) -> Value {
    let data = json!({"node": node, "name": name, "persistent": true});
    json!({"type": "block-dirty-bitmap-add", "data": data})
}

/// A backup that is to be made.
struct Plan<'a> {
    job: &'a ChainJobArguments,
    file: &'a Path,
    how: &'a BackupFile,
    members: Map<String, Value>,
}

impl<'a> Plan<'a> {
    fn new(job: &'a ChainJobArguments, file: &'a Path, how: &'a BackupFile) -> Result<Plan<'a>> {
        refuse_to_overwrite(file, false)?;
        let mut plan = Plan {
            job,
            file,
            how,
            members: Map::new(),
        };
        let format = Format::of(file, how.format)?;
        if plan.is_increment() && format == Format::Raw {
            let text =
                "a raw image cannot be put on another backup: choose qcow2, or leave out --onto";
            return Err(Error::refused(text));
        }
        plan.set("target", text_of(&absolute(file)?)?);
        plan.set("format", format.name());
        plan.set("sync", "full");
        if let Some(policy) = job.on_error {
            plan.set("on-source-error", policy.name());
            plan.set("on-target-error", policy.name());
        }
        if how.compress {
            plan.set("compress", true);
        }
        if let Some(seconds) = how.break_after {
            plan.set("on-cbw-error", "break-snapshot");
            plan.set("cbw-timeout", seconds);
        }
        Ok(plan)
    }

    fn is_increment(&self) -> bool {
        self.how.onto.is_some()
    }

    fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.members.insert(name.to_string(), value.into());
    }

    /// Starts the backup, in one transaction with what comes before it.
    fn carry_out(
        mut self,
        mut started: Started<'_>,
        device: &str,
        before: &[Value],
    ) -> Result<Outcome> {
        self.members.append(&mut common(self.job, device));
        if let Some(onto) = &self.how.onto {
            self.set("mode", "existing");
            overlay(self.file, onto)?;
        }
        let begun = match before {
            [] => started.start("drive-backup", "backup", self.members.clone()),
            _ => started.start_by("transaction", "backup", |id| {
                let mut data = self.members.clone();
                data.insert("job-id".to_string(), id.into());
                let backup = json!({"type": "drive-backup", "data": data});
                let actions: Vec<Value> = before.iter().cloned().chain([backup]).collect();
                Map::from_iter([("actions".to_string(), actions.into())])
            }),
        };
        if let Err(error) = begun {
            if self.is_increment() {
                remove_file(self.file)?;
            }
            return Err(error);
        }
        started.finish(self.job.wait.then_some(Goal::End))
    }
}

/// Makes an empty image on top of an earlier backup.
fn overlay(file: &Path, onto: &Path) -> Result<()> {
    let format = Format::of(onto, None)?;
    let create = CreateArguments {
        file: file.to_owned(),
        size: None,
        format: Some(Format::Qcow2),
        // A header's name is relative to the image.
        backing: Some(absolute(onto)?),
        backing_format: Some(format),
        options: Vec::new(),
        force: false,
    };
    image::run(&ImageCommand::Create(create)).map(drop)
}

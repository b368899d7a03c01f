//! `liveblk checkpoint --fleece`: a moment of a device as an NBD export, and its end.
//!
//! An image with the device as its backing file is the target of a backup that copies only what is about to
//! change: what is read through that image is the moment. Job, node and export have the checkpoint's name.

use std::fs::remove_file;
use std::path::{Path, absolute};
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::backup::{device, rotation};
use super::backup_args::CheckpointArguments;
use super::chain::State;
use super::chain_job::{Started, text_of};
use super::format::Format;
use super::image_args::{CreateArguments, ImageCommand};
use super::job_view;
use super::job_wait::one;
use super::qmp_client::QmpClient;
use super::snapshot::refuse_to_overwrite;
use super::{Outcome, endpoint, image};

/// Between two looks at a job that was cancelled.
const PAUSE: Duration = Duration::from_millis(20);

pub(super) fn run(arguments: &CheckpointArguments, file: &Path) -> Result<Outcome> {
    refuse_to_overwrite(file, false)?;
    let started = Started::connect(&arguments.job)?;
    let device = device(&started, arguments.target.as_deref())?;
    let layers = &started.state.layers;
    let Some(layer) = layers.iter().find(|layer| layer.node_name == device) else {
        unreachable!("the chain of '{device}' begins with a layer");
    };
    let file = absolute(file)?;
    create(&file, layer.virtual_size)?;
    let mut fleece = Fleece {
        arguments,
        device: &device,
        file: &file,
        client: started.client,
        undo: Vec::new(),
    };
    match fleece.begin() {
        Ok(()) => Ok(Outcome::text(format!("{}\n", arguments.checkpoint))),
        Err(error) => {
            fleece.take_back();
            remove_file(&file)?;
            Err(error)
        }
    }
}

fn create(file: &Path, size: u64) -> Result<()> {
    let create = CreateArguments {
        file: file.to_owned(),
        size: Some(size),
        format: Some(Format::Qcow2),
        backing: None,
        backing_format: None,
        options: Vec::new(),
        force: false,
    };
    image::run(&ImageCommand::Create(create)).map(drop)
}

struct Fleece<'a> {
    arguments: &'a CheckpointArguments,
    device: &'a str,
    file: &'a Path,
    client: QmpClient,
    /// What takes back what was done, in the order in which it was.
    undo: Vec<Undo>,
}

/// A step that takes something back.
enum Undo {
    /// By a command.
    Command(&'static str, Value),
    /// By ending the job that has the checkpoint's name.
    Job,
}

impl Fleece<'_> {
    /// The moment comes last, so that nothing can fail after it but the export of what changed since an earlier one: that
    /// bitmap can be shown only when it records no more.
    fn begin(&mut self) -> Result<()> {
        let name = self.arguments.checkpoint.as_str();
        let file = json!({"driver": "file", "filename": text_of(self.file)?});
        self.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "discard": "unmap", "file": file,
                "backing": self.device}),
        )?;
        self.undo
            .push(Undo::Command("blockdev-del", json!({"node-name": name})));
        if let Some(socket) = &self.arguments.nbd {
            let path = absolute(socket)?;
            let address = json!({"type": "unix", "data": {"path": text_of(&path)?}});
            self.execute("nbd-server-start", json!({"addr": address}))?;
            self.undo.push(Undo::Command("nbd-server-stop", json!({})));
        }
        let actions = json!({"actions": self.actions()});
        match &self.arguments.since {
            None => {
                self.export(&[])?;
                self.execute("transaction", actions)
            }
            Some(since) => {
                self.execute("transaction", actions)?;
                let back = json!({"actions": self.counter_rotation(since)});
                self.undo.push(Undo::Command("transaction", back));
                self.undo.push(Undo::Job);
                self.export(&[json!({"node": self.device, "name": since})])
            }
        }
    }

    fn export(&mut self, bitmaps: &[Value]) -> Result<()> {
        let name = self.arguments.checkpoint.as_str();
        let export =
            json!({"type": "nbd", "id": name, "node-name": name, "name": name, "bitmaps": bitmaps});
        self.execute("block-export-add", export)?;
        self.undo
            .push(Undo::Command("block-export-del", json!({"id": name})));
        Ok(())
    }

    /// What the new bitmap has recorded goes to the earlier one, which records again.
    fn counter_rotation(&self, since: &str) -> Vec<Value> {
        let (device, name) = (self.device, self.arguments.checkpoint.as_str());
        let action = |kind: &str, data: Value| json!({"type": format!("block-dirty-bitmap-{kind}"), "data": data});
        vec![
            action("enable", json!({"node": device, "name": since})),
            action(
                "merge",
                json!({"node": device, "target": since, "bitmaps": [name]}),
            ),
            action("remove", json!({"node": device, "name": name})),
        ]
    }

    fn actions(&self) -> Vec<Value> {
        let (arguments, device) = (self.arguments, self.device);
        let name = arguments.checkpoint.as_str();
        let mut data = json!({"device": device, "target": name, "sync": "none", "job-id": name});
        if let Some(speed) = arguments.job.speed {
            data["speed"] = speed.into();
        }
        if let Some(seconds) = arguments.how.break_after {
            data["on-cbw-error"] = "break-snapshot".into();
            data["cbw-timeout"] = seconds.into();
        }
        let mut actions = rotation(arguments, device);
        actions.push(json!({"type": "blockdev-backup", "data": data}));
        actions
    }

    fn execute(&mut self, command: &str, members: Value) -> Result<()> {
        let members = match members {
            Value::Object(members) => members,
            _ => Map::new(),
        };
        self.client.execute(command, members).map(drop)
    }

    fn take_back(&mut self) {
        while let Some(undo) = self.undo.pop() {
            let name = &self.arguments.checkpoint;
            let (command, taken_back) = match undo {
                Undo::Command(command, members) => (command, self.execute(command, members)),
                Undo::Job => ("job-cancel", until_cancelled(&mut self.client, name)),
            };
            if let Err(error) = taken_back {
                tracing::error!(command, %error, "something of a checkpoint stays");
            }
        }
    }
}

/// Ends what a fleecing checkpoint has begun. Only what a backup of its name copies to is taken for one: any other
/// image of that name is somebody's disk.
pub(super) fn release(arguments: &CheckpointArguments) -> Result<Outcome> {
    let name = arguments.checkpoint.as_str();
    let mut client = QmpClient::connect(&endpoint::find(&arguments.job.endpoint)?)?;
    let state = State::query(&mut client)?;
    let chains = state.chains(&[])?;
    let mut jobs = chains.iter().flat_map(|chain| &chain.jobs);
    let copies_to_it = jobs.any(|placed| {
        let (job, target) = (&placed.job, placed.target.as_deref());
        job.id == name && job.kind == "backup" && target == Some(name)
    });
    let layer = state.layers.iter().find(|layer| layer.node_name == name);
    let Some(layer) = layer.filter(|_| copies_to_it) else {
        let text = format!("no checkpoint '{name}' is being shown");
        return Err(Error::new(ErrorKind::NotFound, text));
    };
    let is_exported = state.exports.iter().any(|export| export["id"] == name);
    if is_exported {
        let mut members = one("id", name);
        members.insert("mode".to_string(), "hard".into());
        client.execute("block-export-del", members)?;
    }
    until_cancelled(&mut client, name)?;
    client.execute("blockdev-del", one("node-name", name))?;
    remove_file(scratch_file(&layer.file)?)?;
    Ok(Outcome::text(String::new()))
}

/// The file of an image whose name may be told as JSON, as QEMU does where the backing file is not the header's.
fn scratch_file(name: &str) -> Result<String> {
    let Some(text) = name.strip_prefix("json:") else {
        return Ok(name.to_owned());
    };
    let told: Option<Value> = serde_json::from_str(text).ok();
    let file = told.and_then(|told| Some(told["file"]["filename"].as_str()?.to_owned()));
    file.ok_or_else(|| {
        let text = format!("the file of the checkpoint is not to be found in '{name}': remove it");
        Error::new(ErrorKind::NotFound, text)
    })
}

fn until_cancelled(client: &mut QmpClient, name: &str) -> Result<()> {
    let is_there = |client: &mut QmpClient| -> Result<bool> {
        let jobs = job_view::query(client)?;
        Ok(jobs.iter().any(|job| job.id == name))
    };
    if is_there(client)? {
        client.execute("job-cancel", one("id", name))?;
    }
    while is_there(client)? {
        sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_a_checkpoint_is_found_in_either_name() {
        assert_eq!(scratch_file("/a/b").unwrap(), "/a/b");
        let told = r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/a/b"}}"#;
        assert_eq!(scratch_file(told).unwrap(), "/a/b");
        assert!(scratch_file("json:{}").is_err());
    }
}

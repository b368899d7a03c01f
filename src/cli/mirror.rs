//! `liveblk mirror`: a copy that follows, and takes the place of what it copies.

use std::path::absolute;

use serde_json::Value;

use crate::error::Result;

use super::Outcome;
use super::chain_job::{Started, check_pivoted, common, text_of};
use super::format::Format;
use super::job_args::MirrorArguments;
use super::job_wait::Goal;
use super::names::node_name;
use super::snapshot::refuse_to_overwrite;

pub(super) fn run(arguments: &MirrorArguments) -> Result<Outcome> {
    let job = &arguments.job;
    let file = absolute(&arguments.file)?;
    refuse_to_overwrite(&file, arguments.existing)?;
    let format = Format::of(&file, arguments.format)?;
    let mut started = Started::connect(job)?;
    let chain = started.chain(arguments.target.as_deref())?;
    let device = &chain.layers[0].node_name;
    let taken = |name: &str| {
        started
            .state
            .layers
            .iter()
            .any(|layer| layer.node_name == name)
    };
    let node = match &arguments.node {
        Some(name) => name.clone(),
        None => node_name(&file, taken),
    };
    let mut members = common(job, device);
    let mut add = |name: &str, value: &str| members.insert(name.to_string(), Value::from(value));
    add("target", text_of(&file)?);
    add("format", format.name());
    add("sync", arguments.sync.name());
    add("node-name", &node);
    if arguments.existing {
        add("mode", "existing");
    }
    if let Some(policy) = job.on_error {
        add("on-source-error", policy.name());
        add("on-target-error", policy.name());
    }
    if let Some(mode) = arguments.copy_mode {
        add("copy-mode", mode.name());
    }
    let was_exported = started.exports(device);
    started.start("drive-mirror", "mirror", members)?;
    let goal = match (arguments.no_complete, arguments.no_pivot) {
        (true, _) => Goal::EndOrReady,
        (_, true) => Goal::Parted,
        _ => Goal::Completed,
    };
    let outcome = started.finish(Some(goal))?;
    if goal == Goal::Completed && outcome.status == 0 && was_exported {
        check_pivoted(job, device)?;
    }
    Ok(outcome)
}

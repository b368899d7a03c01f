//! `blockdev-mirror` and `drive-mirror`: what their arguments mean in the graph.

use std::rc::Rc;

use serde_json::json;

use super::{Context, Outcome, job};
use crate::block::{Node, Role};
use crate::blockdev::{
    NewTarget, SnapshotMode, TargetBelow, check_not_busy, find_either, find_listed,
};
use crate::error::{Error, Result};
use crate::job::{Before, ErrorPolicies, Mirror, SyncMode, mirror};
use crate::qmp::schema::Args;

const LEAST_GRANULARITY: u32 = 512;
const MOST_GRANULARITY: u32 = 64 << 20;

/// `blockdev-mirror`.
pub(super) async fn blockdev(context: &Context, args: Args<'_>) -> Outcome {
    let device = find_either(&context.graph, args.required_str("device"))?;
    let target = find_either(&context.graph, args.required_str("target"))?;
    device.check_root()?;
    let before = match args.bool("target-is-zero") {
        Some(true) => Before::Zero,
        _ => Before::Unknown,
    };
    let arguments = Mirror {
        before,
        filter_node_name: job::text(args, "filter-node-name"),
        ..arguments(context, args, device, target)?
    };
    mirror(&context.workshop, arguments).await?;
    Ok(json!({}))
}

/// `drive-mirror`.
pub(super) async fn drive(context: &Context, args: Args<'_>) -> Outcome {
    let device = find_either(&context.graph, args.required_str("device"))?;
    device.check_root()?;
    if args.str("replaces").is_some() && args.str("node-name").is_none() {
        let text = "a node-name must be provided when replacing a named node of the graph";
        return Err(Error::refused(text).into());
    }
    device.check_unoccupied()?;
    let mode = target_mode(args);
    let sync = sync_mode(args)?;
    let backing = match (mode, sync) {
        (SnapshotMode::AbsolutePaths, SyncMode::Top) => attached_below(&device),
        (SnapshotMode::AbsolutePaths, SyncMode::None) => Some(device.clone()),
        _ => None,
    };
    let wanted = NewTarget {
        source: &device,
        filename: args.required_str("target"),
        format: args.str("format"),
        mode,
        node_name: args.str("node-name"),
        backing: backing.as_ref(),
        below: match mode {
            SnapshotMode::Existing if sync != SyncMode::Full => TargetBelow::Named,
            // The job attaches it.
            _ => TargetBelow::Nothing,
        },
        stays_small: false,
    };
    let target = context.blockdev.open_job_target(wanted).await?;
    let started = match arguments(context, args, device, target.node.clone()) {
        Ok(common) => {
            let arguments = Mirror {
                backing,
                before: match mode {
                    SnapshotMode::Existing => Before::Unknown,
                    SnapshotMode::AbsolutePaths => Before::Zero,
                },
                unmap: args.bool("unmap").unwrap_or(true),
                ..common
            };
            mirror(&context.workshop, arguments).await
        }
        Err(error) => Err(error),
    };
    let failed = started.is_err();
    let settled = context.blockdev.settle_job_target(target, failed).await;
    started?;
    settled?;
    Ok(json!({}))
}

/// What both have, checked in QEMU's order.
fn arguments(
    context: &Context,
    args: Args<'_>,
    device: Rc<Node>,
    target: Rc<Node>,
) -> Result<Mirror> {
    let granularity = granularity(args)?;
    device.check_unoccupied()?;
    check_not_busy(&target)?;
    let replaces = replaced(context, args, &device)?;
    let sync = sync_mode(args)?;
    let Ok(buffer) = u64::try_from(args.i64("buf-size").unwrap_or(0)) else {
        return Err(Error::refused("Invalid parameter 'buf-size'"));
    };
    Ok(Mirror {
        job: job::options(args),
        device,
        target,
        sync,
        backing: None,
        before: Before::Unknown,
        replaces,
        granularity,
        buffer,
        unmap: true,
        on_error: ErrorPolicies {
            on_source_error: job::policy(args, "on-source-error"),
            on_target_error: job::policy(args, "on-target-error"),
        },
        copy_mode: job::copy_mode(args).unwrap_or_default(),
        filter_node_name: None,
    })
}

/// Whether the image of the target is made.
pub(super) fn target_mode(args: Args<'_>) -> SnapshotMode {
    match args.str("mode") {
        Some("existing") => SnapshotMode::Existing,
        _ => SnapshotMode::AbsolutePaths,
    }
}

fn granularity(args: Args<'_>) -> Result<Option<u64>> {
    let Some(granularity) = args.u32("granularity").filter(|given| *given != 0) else {
        return Ok(None);
    };
    if !(LEAST_GRANULARITY..=MOST_GRANULARITY).contains(&granularity) {
        let text = "Parameter 'granularity' expects a value in range [512B, 64MB]";
        return Err(Error::refused(text));
    }
    if !granularity.is_power_of_two() {
        return Err(Error::refused(
            "Parameter 'granularity' expects a power of 2",
        ));
    }
    Ok(Some(granularity.into()))
}

fn sync_mode(args: Args<'_>) -> Result<SyncMode> {
    match args.required_str("sync") {
        "full" => Ok(SyncMode::Full),
        "top" => Ok(SyncMode::Top),
        "none" => Ok(SyncMode::None),
        other => Err(Error::refused(format!("Sync mode '{other}' not supported"))),
    }
}

/// Another node than the device whose users get the target: one that the device shows through filters.
fn replaced(context: &Context, args: Args<'_>, device: &Rc<Node>) -> Result<Option<Rc<Node>>> {
    let Some(name) = args.str("replaces") else {
        return Ok(None);
    };
    let node = find_listed(&context.graph, name)?;
    check_not_busy(&node)?;
    if !shows(device, &node) {
        let device = device.name();
        return Err(Error::refused(format!(
            "Cannot replace '{name}' by a node mirrored from '{device}', because it cannot be guaranteed \
             that doing so would not lead to an abrupt change of visible data"
        )));
    }
    if node.size() != device.size() {
        let text = "cannot replace image with a mirror image of different size";
        return Err(Error::refused(text));
    }
    Ok(Some(node).filter(|node| !Rc::ptr_eq(node, device)))
}

/// What is read through `top` is what `node` has.
fn shows(top: &Rc<Node>, node: &Rc<Node>) -> bool {
    let mut next = Some(top.clone());
    while let Some(layer) = next {
        if Rc::ptr_eq(&layer, node) {
            return true;
        }
        next = layer.filtered().map(|edge| edge.node());
    }
    false
}

/// What the device has as its backing file.
pub(super) fn attached_below(device: &Rc<Node>) -> Option<Rc<Node>> {
    let edge = device.without_filters().child(Role::Backing)?;
    Some(edge.node())
}

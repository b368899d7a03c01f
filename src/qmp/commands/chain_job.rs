//! `block-stream` and `block-commit`: what their arguments mean in the graph.

use std::rc::Rc;

use serde_json::json;

use super::{Context, Outcome, job};
use crate::block::Node;
use crate::blockdev::{chain_contains, find_either, find_in_chain, find_node};
use crate::error::{Error, Result};
use crate::job::{Commit, Job, Stream, check_unoccupied};
use crate::qmp::error::{ErrorClass, QmpError};
use crate::qmp::schema::Args;

/// `block-stream`.
pub(super) async fn stream(context: &Context, args: Args<'_>) -> Outcome {
    let turn = context.changes.lock().await;
    let device = find_either(&context.graph, args.required_str("device"))?;
    let base = stream_base(context, args, &device)?;
    let arguments = Stream {
        job: job::options(args),
        device,
        base,
        backing_file: job::text(args, "backing-file"),
        mask_protocol: args.bool("backing-mask-protocol").unwrap_or(false),
        on_error: job::policy(args, "on-error"),
        filter_node_name: job::text(args, "filter-node-name"),
    };
    let started = crate::job::stream(&context.workshop, arguments).await?;
    drop(turn);
    job::let_short_job_end(&started).await;
    Ok(json!({}))
}

fn stream_base(context: &Context, args: Args<'_>, device: &Rc<Node>) -> Result<Option<Rc<Node>>> {
    let (base, base_node) = (args.str("base"), args.str("base-node"));
    let bottom = args.str("bottom");
    let both = |one: &str, other: &str| {
        let text = format!("'{one}' and '{other}' cannot be specified at the same time");
        Err(Error::refused(text))
    };
    match (base, base_node, bottom) {
        (Some(_), Some(_), _) => both("base", "base-node"),
        (Some(_), _, Some(_)) => both("base", "bottom"),
        (_, Some(_), Some(_)) => both("bottom", "base-node"),
        (Some(file), _, _) => match find_in_chain(device, file) {
            Some(node) => Ok(Some(node)),
            None => Err(no_such_image(file)),
        },
        (_, Some(name), _) => {
            let node = find_node(&context.graph, name)?;
            if Rc::ptr_eq(&node, device) || !chain_contains(device, &node) {
                let device = device.name();
                let text = format!("Node '{name}' is not a backing image of '{device}'");
                return Err(Error::refused(text));
            }
            Ok(Some(node))
        }
        (_, _, Some(name)) => {
            let node = find_node(&context.graph, name)?;
            if node.driver().is_filter() {
                let text = format!("Node '{name}' is a filter, use a non-filter node as 'bottom'");
                return Err(Error::refused(text));
            }
            if !chain_contains(device, &node) {
                let device = device.name();
                let text = format!("Node '{name}' is not in a chain starting from '{device}'");
                return Err(Error::refused(text));
            }
            Ok(node.backing())
        }
        (None, None, None) => Ok(None),
    }
}

/// `block-commit`.
pub(super) async fn commit(context: &Context, args: Args<'_>) -> Outcome {
    let _turn = context.changes.lock().await;
    let name = args.required_str("device");
    let Some(device) = context.graph.find(name) else {
        let text = format!("Device '{name}' not found");
        return Err(QmpError::new(ErrorClass::DeviceNotFound, text));
    };
    start_commit(context, args, device).await?;
    Ok(json!({}))
}

async fn start_commit(context: &Context, args: Args<'_>, device: Rc<Node>) -> Result<Rc<Job>> {
    device.check_root()?;
    device.check_unoccupied()?;
    let top = commit_top(context, args, &device)?;
    let base = commit_base(context, args, &top)?;
    check_unoccupied(&top, Some(&base))?;
    base.check_unoccupied()?;
    if Rc::ptr_eq(&base, &top) {
        return Err(Error::refused("cannot commit an image into itself"));
    }
    let is_active = Rc::ptr_eq(&top, &device);
    if is_active && args.str("backing-file").is_some() {
        let text = "'backing-file' specified, but 'top' is the active layer";
        return Err(Error::refused(text));
    }
    let copy_mode = job::copy_mode(args);
    if !is_active && copy_mode.is_some() {
        let text = "'copy-mode' specified, but 'top' is not the active layer";
        return Err(Error::refused(text));
    }
    let arguments = Commit {
        job: job::options(args),
        device,
        top,
        base,
        backing_file: job::text(args, "backing-file"),
        mask_protocol: args.bool("backing-mask-protocol").unwrap_or(false),
        on_error: job::policy(args, "on-error"),
        copy_mode: copy_mode.unwrap_or_default(),
        filter_node_name: job::text(args, "filter-node-name"),
    };
    if is_active {
        crate::job::commit_active(&context.workshop, arguments).await
    } else {
        crate::job::commit(&context.workshop, arguments).await
    }
}

fn commit_top(context: &Context, args: Args<'_>, device: &Rc<Node>) -> Result<Rc<Node>> {
    match (args.str("top"), args.str("top-node")) {
        (Some(_), Some(_)) => Err(Error::refused(
            "'top-node' and 'top' are mutually exclusive",
        )),
        (None, None) => Ok(device.clone()),
        (_, Some(name)) => in_chain(context, device, name),
        (Some(file), _) if file == device.file_name() => Ok(device.clone()),
        (Some(file), _) => find_in_chain(device, file)
            .ok_or_else(|| Error::refused(format!("Top image file {file} not found"))),
    }
}

fn commit_base(context: &Context, args: Args<'_>, top: &Rc<Node>) -> Result<Rc<Node>> {
    match (args.str("base"), args.str("base-node")) {
        (Some(_), Some(_)) => Err(Error::refused(
            "'base-node' and 'base' are mutually exclusive",
        )),
        (None, None) => Ok(bottom_of(top)),
        (_, Some(name)) => in_chain(context, top, name),
        (Some(file), _) => find_in_chain(top, file).ok_or_else(|| no_such_image(file)),
    }
}

fn in_chain(context: &Context, top: &Rc<Node>, name: &str) -> Result<Rc<Node>> {
    let node = find_node(&context.graph, name)?;
    if chain_contains(top, &node) {
        return Ok(node);
    }
    let text = format!("'{name}' is not in this backing file chain");
    Err(Error::refused(text))
}

fn bottom_of(top: &Rc<Node>) -> Rc<Node> {
    let mut node = top.clone();
    while let Some(below) = node.backing() {
        node = below;
    }
    node
}

fn no_such_image(file: &str) -> Error {
    Error::refused(format!("Can't find '{file}' in the backing chain"))
}

//! `transaction`: which changes its actions are. That all or none are made, at one moment, is the graph's affair.

use std::rc::Rc;

use serde_json::{Value, json};

use super::backup::Company;
use super::{Context, Outcome, backup, bitmap, snapshot};
use crate::block::{Action, DrainedSection, IoFuture, Node};
use crate::error::{Error, ErrorKind};
use crate::job::JobGroup;
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;

/// `transaction`.
pub(super) async fn run(context: &Context, args: Args<'_>) -> Outcome {
    let actions = args.array("actions").unwrap_or_default();
    let properties = args.object("properties");
    let is_grouped = properties.and_then(|these| these.str("completion-mode")) == Some("grouped");
    let group = is_grouped.then(Rc::<JobGroup>::default);
    if is_grouped {
        check_grouped(actions)?;
    }
    let company = Company::Transaction(group.as_ref());
    let mut prepared = Vec::with_capacity(actions.len());
    for action in actions {
        match prepare(context, Args::new(action), company).await {
            Ok(action) => prepared.push(action),
            Err(error) => {
                context.graph.give_up(&prepared).await;
                return Err(error);
            }
        }
    }
    let started = context.workshop.jobs.handle().now();
    let done = context.graph.transact(&prepared).await;
    let took = context.workshop.jobs.handle().now() - started;
    tracing::info!(
        actions = actions.len(),
        ?took,
        succeeded = done.is_ok(),
        "a transaction"
    );
    done?;
    Ok(json!({}))
}

/// Only backups end later than the transaction, and so together.
fn check_grouped(actions: &[Value]) -> Result<(), QmpError> {
    let mut kinds = actions
        .iter()
        .map(|action| Args::new(action).required_str("type"));
    match kinds.find(|kind| !matches!(*kind, "blockdev-backup" | "drive-backup")) {
        None => Ok(()),
        Some(kind) => Err(QmpError::generic(format!(
            "Action '{kind}' does not support transaction property completion-mode = grouped"
        ))),
    }
}

/// What of an action takes long and needs no moment of its own.
async fn prepare(
    context: &Context,
    action: Args<'_>,
    company: Company<'_>,
) -> Result<Box<dyn Action>, QmpError> {
    let kind = action.required_str("type");
    let Some(data) = action.object("data") else {
        unreachable!("the schema makes 'data' mandatory");
    };
    let blockdev = &context.blockdev;
    if let Some(what) = kind.strip_prefix("block-dirty-bitmap-") {
        let change = bitmap::change(what, data);
        return Ok(Box::new(blockdev.prepare_bitmap(change)));
    }
    Ok(match kind {
        "abort" => Box::new(Abort),
        "blockdev-backup" => Box::new(backup::prepare(context, data, company).await?),
        "drive-backup" => Box::new(backup::prepare_drive(context, data, company).await?),
        "blockdev-snapshot-sync" => {
            let request = snapshot::request(data);
            Box::new(blockdev.prepare_snapshot_sync(request).await?)
        }
        "blockdev-snapshot" => {
            let (node, overlay) = (data.required_str("node"), data.required_str("overlay"));
            Box::new(blockdev.prepare_snapshot(node, overlay).await?)
        }
        "blockdev-snapshot-internal-sync" => Box::new(snapshot::prepare_internal(context, data)?),
        other => unreachable!("the schema has an action '{other}' without code"),
    })
}

/// Fails, so that clients can try what a failure does.
struct Abort;

impl Action for Abort {
    fn nodes(&self) -> Vec<Rc<Node>> {
        Vec::new()
    }

    fn make<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(async {
            let message = "Transaction aborted using Abort action";
            Err(Error::new(ErrorKind::Cancelled, message))
        })
    }

    fn undo<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        unreachable!("it is never made")
    }

    fn settle(&self, _made: bool) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

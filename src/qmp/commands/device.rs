//! `block_resize`: the node, and the disks that show it.

use serde_json::json;

use super::{Context, Outcome};
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;

pub(super) async fn resize(context: &Context, args: Args<'_>) -> Outcome {
    let (device, node) = (args.str("device"), args.str("node-name"));
    let Some(size) = args.i64("size") else {
        unreachable!("the schema makes 'size' mandatory");
    };
    context.blockdev.resize(device, node, size).await?;
    if let Some(node) = node {
        tell_disks(context, node).await?;
    }
    Ok(json!({}))
}

/// Users of ublk disks see the new size at once.
#[cfg(feature = "ublk")]
async fn tell_disks(context: &Context, node: &str) -> Result<(), QmpError> {
    use crate::export::ublk::UblkExport;
    for status in context.exports.list() {
        let disk = status.export.as_any().downcast_ref::<UblkExport>();
        if let Some(disk) = disk
            && status.export.root().node().name() == node
        {
            disk.update_size().await?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "ublk"))]
async fn tell_disks(_context: &Context, _node: &str) -> Result<(), QmpError> {
    Ok(())
}

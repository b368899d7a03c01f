//! `block_resize`.

use std::rc::Rc;

use serde_json::json;

use super::{Context, Outcome};
use crate::block::{Node, Permission, Permissions, TruncateOptions};
use crate::blockdev;
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;

/// What a new size must be: bytes that the area added reads as are zero, whatever a backing file has there.
const RESIZE: TruncateOptions = TruncateOptions {
    exact: true,
    zero_new: true,
};

pub(super) async fn resize(context: &Context, args: Args<'_>) -> Outcome {
    let (device, name) = (args.str("device"), args.str("node-name"));
    let node = blockdev::find_device_or_node(&context.graph, device, name)?;
    let size = args.i64("size").and_then(|size| u64::try_from(size).ok());
    let Some(size) = size else {
        return Err(QmpError::generic("Parameter 'size' expects a >0 size"));
    };
    blockdev::check_not_backing(&node)?;
    resize_node(context, &node, size).await?;
    tell_devices(context, &node).await?;
    Ok(json!({}))
}

async fn resize_node(context: &Context, node: &Rc<Node>, size: u64) -> Result<(), QmpError> {
    let drained = context.graph.drain(std::slice::from_ref(node)).await?;
    let permissions = Permissions {
        required: Permission::RESIZE,
        shared: Permission::all(),
    };
    let description = "an unnamed block device";
    let root = context.graph.attach_root(description, node, permissions)?;
    let result = root.truncate(size, RESIZE).await;
    drop(drained);
    let detached = context.graph.detach(&root).await;
    Ok(result.and(detached)?)
}

/// Users of ublk disks see the new size at once.
#[cfg(feature = "ublk")]
async fn tell_devices(context: &Context, node: &Rc<Node>) -> Result<(), QmpError> {
    use crate::export::ublk::UblkExport;
    for status in context.exports.list() {
        let export = status.export.as_any().downcast_ref::<UblkExport>();
        if let Some(export) = export
            && Rc::ptr_eq(&status.export.root().node(), node)
        {
            export.update_size().await?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "ublk"))]
async fn tell_devices(_context: &Context, _node: &Rc<Node>) -> Result<(), QmpError> {
    Ok(())
}

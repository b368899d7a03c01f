//! `block_resize`: the node, and the disks that show it.

use serde_json::json;

use super::{Context, Outcome};
use crate::qmp::schema::Args;

pub(super) async fn resize(context: &Context, args: Args<'_>) -> Outcome {
    let (device, node) = (args.str("device"), args.str("node-name"));
    let Some(size) = args.i64("size") else {
        unreachable!("the schema makes 'size' mandatory");
    };
    context.blockdev.resize(device, node, size).await?;
    context.exports.update_sizes().await?;
    Ok(json!({}))
}

//! Overlays, and what their headers say.

use serde_json::json;

use super::{Context, Outcome};
use crate::blockdev::{SnapshotMode, SnapshotSync};
use crate::qmp::schema::Args;

/// `blockdev-snapshot-sync`.
pub(super) async fn create(context: &Context, args: Args<'_>) -> Outcome {
    context.blockdev.snapshot_sync(request(args)).await?;
    Ok(json!({}))
}

/// What `blockdev-snapshot-sync` asks for.
pub(super) fn request(args: Args<'_>) -> SnapshotSync {
    let text = |name| args.str(name).map(str::to_owned);
    SnapshotSync {
        device: text("device"),
        node_name: text("node-name"),
        snapshot_file: args.required_str("snapshot-file").into(),
        snapshot_node_name: text("snapshot-node-name"),
        format: text("format"),
        mode: match args.str("mode") {
            Some("existing") => SnapshotMode::Existing,
            _ => SnapshotMode::AbsolutePaths,
        },
    }
}

/// `blockdev-snapshot`.
pub(super) async fn attach(context: &Context, args: Args<'_>) -> Outcome {
    let (node, overlay) = (args.required_str("node"), args.required_str("overlay"));
    context.blockdev.snapshot(node, overlay).await?;
    Ok(json!({}))
}

/// `change-backing-file`.
pub(super) async fn change_backing_file(context: &Context, args: Args<'_>) -> Outcome {
    let device = args.required_str("device");
    let image = args.required_str("image-node-name");
    let backing = args.required_str("backing-file");
    context
        .blockdev
        .change_backing_file(device, image, backing)
        .await?;
    Ok(json!({}))
}

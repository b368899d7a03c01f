//! Overlays, what their headers say, and snapshots within an image.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::blockdev::{NewInternalSnapshot, SnapshotMode, SnapshotSync};
use crate::error::Result;
use crate::format::qcow2::snapshot_table::InternalSnapshot;
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

/// `blockdev-snapshot-internal-sync`.
pub(super) async fn create_internal(context: &Context, args: Args<'_>) -> Outcome {
    let new = prepare_internal(context, args)?;
    context.graph.transact(&[Box::new(new)]).await?;
    Ok(json!({}))
}

/// What it does before guest requests have to wait.
pub(super) fn prepare_internal(context: &Context, args: Args<'_>) -> Result<NewInternalSnapshot> {
    let (device, name) = (args.required_str("device"), args.required_str("name"));
    context
        .blockdev
        .prepare_internal_snapshot(device, name, date_of(SystemTime::now()))
}

/// Seconds since 1970, as far as images can say them, and nanoseconds.
pub(crate) fn date_of(now: SystemTime) -> (u32, u32) {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    (
        u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        since.subsec_nanos(),
    )
}

/// `blockdev-snapshot-delete-internal-sync`.
pub(super) async fn delete_internal(context: &Context, args: Args<'_>) -> Outcome {
    let device = args.required_str("device");
    let deleted =
        context
            .blockdev
            .delete_internal_snapshot(device, args.str("id"), args.str("name"));
    Ok(snapshot_info(&deleted.await?))
}

/// `SnapshotInfo`.
pub(crate) fn snapshot_info(snapshot: &InternalSnapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut info = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / SECOND,
        "vm-clock-nsec": snapshot.vm_clock % SECOND,
    });
    if let Some(count) = snapshot.instructions {
        info["icount"] = count.into();
    }
    info
}

//! Dirty bitmaps by name.

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::blockdev::NewBitmap;
use crate::qmp::schema::Args;

/// `block-dirty-bitmap-add`.
pub(super) async fn add(context: &Context, args: Args<'_>) -> Outcome {
    let new = NewBitmap {
        node: args.required_str("node").into(),
        name: args.required_str("name").into(),
        granularity: args.u32("granularity"),
        persistent: args.bool("persistent").unwrap_or(false),
        disabled: args.bool("disabled").unwrap_or(false),
    };
    context.blockdev.add_bitmap(new).await?;
    Ok(json!({}))
}

/// `block-dirty-bitmap-remove`.
pub(super) async fn remove(context: &Context, args: Args<'_>) -> Outcome {
    let (node, name) = named(args);
    context.blockdev.remove_bitmap(node, name).await?;
    Ok(json!({}))
}

/// `block-dirty-bitmap-clear`.
pub(super) fn clear(context: &Context, args: Args<'_>) -> Outcome {
    let (node, name) = named(args);
    context.blockdev.clear_bitmap(node, name)?;
    Ok(json!({}))
}

/// `block-dirty-bitmap-enable` and `-disable`.
pub(super) async fn enable(context: &Context, args: Args<'_>, enable: bool) -> Outcome {
    let (node, name) = named(args);
    context.blockdev.enable_bitmap(node, name, enable).await?;
    Ok(json!({}))
}

/// `block-dirty-bitmap-merge`.
pub(super) async fn merge(context: &Context, args: Args<'_>) -> Outcome {
    let (node, target) = (args.required_str("node"), args.required_str("target"));
    let sources = args.array("bitmaps").unwrap_or_default();
    let sources: Vec<(Option<&str>, &str)> = sources.iter().map(source).collect();
    context
        .blockdev
        .merge_bitmaps(node, target, &sources)
        .await?;
    Ok(json!({}))
}

/// `x-debug-block-dirty-bitmap-sha256`.
pub(super) fn sha256(context: &Context, args: Args<'_>) -> Outcome {
    let (node, name) = named(args);
    let digest = context.blockdev.bitmap_sha256(node, name)?;
    Ok(json!({"sha256": digest}))
}

fn named(args: Args<'_>) -> (&str, &str) {
    (args.required_str("node"), args.required_str("name"))
}

/// The node, where one is given, and the name.
fn source(value: &Value) -> (Option<&str>, &str) {
    match value {
        Value::String(name) => (None, name),
        other => {
            let (node, name) = named(Args::new(other));
            (Some(node), name)
        }
    }
}

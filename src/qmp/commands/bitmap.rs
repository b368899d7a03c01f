//! Dirty bitmaps by name.

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::blockdev::{BitmapChange, BitmapName, NewBitmap};
use crate::qmp::schema::Args;

/// `block-dirty-bitmap-` and `what`: `add`, `remove`, `clear`, `enable`, `disable`, `merge`.
pub(super) async fn run(context: &Context, what: &str, args: Args<'_>) -> Outcome {
    context.blockdev.change_bitmap(change(what, args)).await?;
    Ok(json!({}))
}

/// The same as an action of a transaction.
pub(super) fn change(what: &str, args: Args<'_>) -> BitmapChange {
    match what {
        "add" => BitmapChange::Add(NewBitmap {
            node: args.required_str("node").into(),
            name: args.required_str("name").into(),
            granularity: args.u32("granularity"),
            persistent: args.bool("persistent").unwrap_or(false),
            disabled: args.bool("disabled").unwrap_or(false),
        }),
        "remove" => BitmapChange::Remove(named(args)),
        "clear" => BitmapChange::Clear(named(args)),
        "enable" => BitmapChange::Enable(named(args), true),
        "disable" => BitmapChange::Enable(named(args), false),
        "merge" => merge(args),
        other => unreachable!("the schema has 'block-dirty-bitmap-{other}' without code"),
    }
}

fn merge(args: Args<'_>) -> BitmapChange {
    let node = args.required_str("node");
    let sources = args.array("bitmaps").unwrap_or_default();
    BitmapChange::Merge {
        target: BitmapName {
            node: node.into(),
            name: args.required_str("target").into(),
        },
        sources: sources.iter().map(|value| source(node, value)).collect(),
    }
}

/// `x-debug-block-dirty-bitmap-sha256`.
pub(super) fn sha256(context: &Context, args: Args<'_>) -> Outcome {
    let (node, name) = (args.required_str("node"), args.required_str("name"));
    let digest = context.blockdev.bitmap_sha256(node, name)?;
    Ok(json!({"sha256": digest}))
}

fn named(args: Args<'_>) -> BitmapName {
    BitmapName {
        node: args.required_str("node").into(),
        name: args.required_str("name").into(),
    }
}

/// Of the target's node, where only a name is given.
fn source(node: &str, value: &Value) -> BitmapName {
    match value {
        Value::String(name) => BitmapName {
            node: node.into(),
            name: name.clone(),
        },
        other => named(Args::new(other)),
    }
}

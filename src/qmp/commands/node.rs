//! Nodes: adding, removing, changing.

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::blockdev;
use crate::qmp::schema::Args;

/// `blockdev-add` and `--blockdev`.
pub(super) async fn add(context: &Context, description: Value) -> Outcome {
    context.blockdev.add(options(description)).await?;
    Ok(json!({}))
}

/// `blockdev-del`.
pub(super) async fn remove(context: &Context, args: Args<'_>) -> Outcome {
    let name = args.required_str("node-name");
    context.blockdev.delete(name).await?;
    Ok(json!({}))
}

/// `blockdev-reopen`.
pub(super) async fn reopen(context: &Context, mut arguments: Value) -> Outcome {
    let descriptions = match arguments["options"].take() {
        Value::Array(descriptions) => descriptions.into_iter().map(options).collect(),
        other => unreachable!("the schema makes 'options' an array, not {other}"),
    };
    context.blockdev.reopen(descriptions).await?;
    Ok(json!({}))
}

/// A checked description as `blockdev` takes it, which knows no JSON.
pub(super) fn options(value: Value) -> blockdev::Value {
    match value {
        Value::Null => blockdev::Value::Null,
        Value::Bool(value) => blockdev::Value::Bool(value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => blockdev::Value::Int(number.into()),
            (None, Some(number)) => blockdev::Value::Int(number.into()),
            (None, None) => unreachable!("no option of a node is a fraction, as {number} is"),
        },
        Value::String(text) => blockdev::Value::Str(text),
        Value::Array(values) => blockdev::Value::List(values.into_iter().map(options).collect()),
        Value::Object(members) => {
            let members = members.into_iter();
            blockdev::Value::Map(
                members
                    .map(|(name, value)| (name, options(value)))
                    .collect(),
            )
        }
    }
}

//! `liveblk bitmap`: the dirty bitmaps of an instance.

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::args::Output;
use super::bitmap_args::{BitmapAddArguments, BitmapCommand, BitmapListArguments, BitmapName};
use super::chain::State;
use super::qmp_client::QmpClient;
use super::snapshot::only_exported;
use super::{Outcome, endpoint, size};

pub(super) fn run(command: &BitmapCommand) -> Result<Outcome> {
    match command {
        BitmapCommand::List(arguments) => list(arguments),
        BitmapCommand::Add(arguments) => add(arguments),
        BitmapCommand::Remove(bitmap) => tell("block-dirty-bitmap-remove", bitmap, |_| ()),
        BitmapCommand::Clear(bitmap) => tell("block-dirty-bitmap-clear", bitmap, |_| ()),
        BitmapCommand::Enable(bitmap) => tell("block-dirty-bitmap-enable", bitmap, |_| ()),
        BitmapCommand::Disable(bitmap) => tell("block-dirty-bitmap-disable", bitmap, |_| ()),
        BitmapCommand::Merge(arguments) => {
            tell("block-dirty-bitmap-merge", &arguments.bitmap, |members| {
                let target = members.remove("name").unwrap_or_default();
                members.insert("target".to_string(), target);
                members.insert("bitmaps".to_string(), json!(arguments.sources));
            })
        }
    }
}

fn add(arguments: &BitmapAddArguments) -> Result<Outcome> {
    tell("block-dirty-bitmap-add", &arguments.bitmap, |members| {
        if let Some(granularity) = arguments.granularity {
            members.insert("granularity".to_string(), granularity.into());
        }
        members.insert("persistent".to_string(), arguments.persistent.into());
        members.insert("disabled".to_string(), arguments.disabled.into());
    })
}

/// A command about one bitmap.
fn tell(
    command: &str,
    bitmap: &BitmapName,
    more: impl FnOnce(&mut Map<String, Value>),
) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(&bitmap.endpoint)?)?;
    let state = State::query(&mut client)?;
    let node = match &bitmap.target {
        Some(target) => state.node_of(target),
        None => only_exported(&state)?,
    };
    let pairs = [("node", node.as_str()), ("name", bitmap.bitmap.as_str())];
    let pairs = pairs.map(|(name, value)| (name.to_string(), Value::from(value)));
    let mut members = Map::from_iter(pairs);
    more(&mut members);
    client.execute(command, members)?;
    Ok(Outcome::text(String::new()))
}

fn list(arguments: &BitmapListArguments) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
    let wanted = match &arguments.target {
        Some(target) => Some(State::query(&mut client)?.node_of(target)),
        None => None,
    };
    let flat = Map::from_iter([("flat".to_string(), true.into())]);
    let nodes = client.execute("query-named-block-nodes", flat)?;
    let found = bitmaps(&nodes, wanted.as_deref())?;
    Ok(Outcome::text(match arguments.output {
        Output::Json => format!("{:#}\n", Value::from(found)),
        Output::Human if found.is_empty() => "no bitmaps\n".to_string(),
        Output::Human => found.iter().map(line).collect(),
    }))
}

/// The named bitmaps of a node, or of all, each with its node.
fn bitmaps(nodes: &Value, wanted: Option<&str>) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    let mut known = false;
    for node in nodes.as_array().into_iter().flatten() {
        let name = node["node-name"].as_str().unwrap_or_default();
        if wanted.is_some_and(|wanted| wanted != name) {
            continue;
        }
        known = true;
        let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
        for bitmap in bitmaps.filter(|bitmap| bitmap["name"].is_string()) {
            let mut bitmap = bitmap.clone();
            bitmap["node"] = name.into();
            found.push(bitmap);
        }
    }
    match wanted {
        Some(wanted) if !known => {
            let text = format!("there is no node '{wanted}'");
            Err(Error::new(ErrorKind::NotFound, text))
        }
        _ => Ok(found),
    }
}

/// `node: name  3 MiB dirty (64 KiB each), recording, persistent`
fn line(bitmap: &Value) -> String {
    let text = |name: &str| bitmap[name].as_str().unwrap_or_default();
    let bytes = |name: &str| size::human(bitmap[name].as_u64().unwrap_or(0));
    let states = ["recording", "persistent", "busy", "inconsistent"];
    let states = states.into_iter().filter(|state| bitmap[*state] == true);
    let states: String = states.map(|state| format!(", {state}")).collect();
    format!(
        "{}: {}  {} dirty ({} each){states}\n",
        text("node"),
        text("name"),
        bytes("count"),
        bytes("granularity"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Value {
        json!([
            {"node-name": "a", "dirty-bitmaps": [
                {"name": "b0", "count": 196_608, "granularity": 65536, "recording": true,
                    "persistent": true, "busy": false},
                {"count": 0, "granularity": 65536, "recording": true}]},
            {"node-name": "c"},
        ])
    }

    #[test]
    fn named_bitmaps_are_listed_with_their_node() {
        let all = bitmaps(&nodes(), None).unwrap();
        assert_eq!(all.len(), 1);
        let text = "a: b0  192 KiB dirty (64 KiB each), recording, persistent\n";
        assert_eq!(line(&all[0]), text);
        assert!(bitmaps(&nodes(), Some("c")).unwrap().is_empty());
        let error = bitmaps(&nodes(), Some("x")).unwrap_err();
        assert_eq!(error.message(), "there is no node 'x'");
    }
}

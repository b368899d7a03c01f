//! `liveblk snapshot`: a new overlay on top of a chain in use.

use std::path::{Path, absolute};

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

use super::args::SnapshotArguments;
use super::chain::State;
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint};

/// Longest node-name that QMP accepts, in bytes.
const NODE_NAME_MAX: usize = 31;

pub(super) fn run(arguments: &SnapshotArguments) -> Result<Outcome> {
    let overlay = absolute(&arguments.overlay)?;
    refuse_to_overwrite(&overlay, arguments.existing)?;
    let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
    let state = State::query(&mut client)?;
    let node = match &arguments.target {
        Some(target) => state.node_of(target),
        None => only_exported(&state)?,
    };
    let overlay_node = match &arguments.overlay_node {
        Some(name) => name.clone(),
        None => unused_name(&state, &overlay),
    };
    let file = overlay.to_str().ok_or_else(|| {
        let text = format!(
            "'{}': QMP cannot carry a name that is not UTF-8",
            overlay.display()
        );
        Error::new(ErrorKind::InvalidArgument, text)
    })?;
    let mode = match arguments.existing {
        true => "existing",
        false => "absolute-paths",
    };
    let members = [
        ("node-name", node.as_str()),
        ("snapshot-file", file),
        ("snapshot-node-name", &overlay_node),
        ("format", "qcow2"),
        ("mode", mode),
    ];
    client.execute("blockdev-snapshot-sync", object(&members))?;
    Ok(Outcome::text(format!("{overlay_node}\n")))
}

fn object(members: &[(&str, &str)]) -> Map<String, Value> {
    let pair = |(name, value): &(&str, &str)| (name.to_string(), Value::from(*value));
    members.iter().map(pair).collect()
}

/// The daemon would empty a file that is there.
fn refuse_to_overwrite(overlay: &Path, existing: bool) -> Result<()> {
    if existing || overlay.symlink_metadata().is_err() {
        return Ok(());
    }
    let text = format!(
        "'{}' exists; give --existing to use that image as it is",
        overlay.display()
    );
    Err(Error::new(ErrorKind::InvalidArgument, text))
}

fn only_exported(state: &State) -> Result<String> {
    let mut exported = state.exported();
    let (kind, text) = match exported.len() {
        1 => return Ok(exported.remove(0)),
        0 => (
            ErrorKind::NotFound,
            "nothing is exported; name the node on which to put the overlay".to_string(),
        ),
        _ => {
            let names = exported.join(", ");
            let text = format!("several nodes are exported, name the one that is meant: {names}");
            (ErrorKind::InvalidArgument, text)
        }
    };
    Err(Error::new(kind, text))
}

/// A well-formed node-name made of the file's stem, with a number if a node has it.
fn unused_name(state: &State, file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let allowed = |c: char| match c.is_ascii_alphanumeric() || "-._".contains(c) {
        true => c,
        false => '-',
    };
    let mut base: String = stem.chars().map(allowed).collect();
    if !base.starts_with(|c: char| c.is_ascii_alphabetic()) {
        base.insert_str(0, "n-");
    }
    base.truncate(NODE_NAME_MAX - 5);
    let taken = |name: &str| state.layers.iter().any(|layer| layer.node_name == name);
    let numbered = (2_u32..).map(|number| format!("{base}-{number}"));
    std::iter::once(base.clone())
        .chain(numbered)
        .find(|name| !taken(name))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::chain::tests::{exported, three_layers};
    use super::*;

    #[test]
    fn the_only_exported_node_is_meant() {
        assert_eq!(only_exported(&three_layers(exported())).unwrap(), "node-C");
        let none = only_exported(&three_layers(json!([]))).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::NotFound);
        let two = json!([
            {"id": "b", "type": "nbd", "node-name": "node-B"},
            {"id": "a", "type": "nbd", "node-name": "node-C"},
        ]);
        let error = only_exported(&three_layers(two)).unwrap_err();
        assert!(error.message().ends_with(": node-C, node-B"), "{error}");
    }

    #[test]
    fn node_names_are_made_of_file_names() {
        let state = three_layers(json!([]));
        let name = |file: &str| unused_name(&state, Path::new(file));
        assert_eq!(name("/d/monday.qcow2"), "monday");
        assert_eq!(name("node-C.qcow2"), "node-C-2");
        assert_eq!(name("2026 ä.qcow2"), "n-2026--");
        let long = name(&"a".repeat(200));
        assert_eq!(long.len(), NODE_NAME_MAX - 5);
    }

    #[test]
    fn a_file_that_exists_is_not_overwritten() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("o.qcow2");
        assert!(refuse_to_overwrite(&file, false).is_ok());
        std::fs::write(&file, "x").unwrap();
        assert!(refuse_to_overwrite(&file, false).is_err());
        assert!(refuse_to_overwrite(&file, true).is_ok());
    }
}

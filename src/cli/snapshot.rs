//! `liveblk snapshot`: a new overlay on top of a chain in use.

use std::path::{Path, absolute};

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

use super::args::SnapshotArguments;
use super::chain::State;
use super::names::node_name;
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint};

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
        None => node_name(&overlay, |name| {
            state.layers.iter().any(|layer| layer.node_name == name)
        }),
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
pub(super) fn refuse_to_overwrite(overlay: &Path, existing: bool) -> Result<()> {
    if existing || overlay.symlink_metadata().is_err() {
        return Ok(());
    }
    let text = format!(
        "'{}' exists; give --existing to use that image as it is",
        overlay.display()
    );
    Err(Error::new(ErrorKind::InvalidArgument, text))
}

/// The exported node that is meant when none is named.
pub(super) fn only_exported(state: &State) -> Result<String> {
    let mut exported = state.exported();
    let (kind, text) = match exported.len() {
        1 => return Ok(exported.remove(0)),
        0 => (
            ErrorKind::NotFound,
            "nothing is exported; name the node that is meant".to_string(),
        ),
        _ => {
            let names = exported.join(", ");
            let text = format!("several nodes are exported, name the one that is meant: {names}");
            (ErrorKind::InvalidArgument, text)
        }
    };
    Err(Error::new(kind, text))
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
    fn a_file_that_exists_is_not_overwritten() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("o.qcow2");
        assert!(refuse_to_overwrite(&file, false).is_ok());
        std::fs::write(&file, "x").unwrap();
        assert!(refuse_to_overwrite(&file, false).is_err());
        assert!(refuse_to_overwrite(&file, true).is_ok());
    }
}

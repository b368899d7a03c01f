//! `liveblk chain`: chains put together from what a running instance says about its nodes.
//!
//! QMP lists nodes without their edges: a node's backing node is the one whose `file` is the node's
//! `backing_file`.

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::args::{ChainArguments, Output};
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint, picture};

/// Drivers whose nodes are a format's file and no layer by themselves.
const PROTOCOLS: &[&str] = &["file", "host_device", "nbd", "null-co"];

/// A node as `query-named-block-nodes` describes it.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) node_name: String,
    pub(super) driver: String,
    pub(super) file: String,
    pub(super) read_only: bool,
    /// Size of the virtual disk in bytes.
    pub(super) virtual_size: u64,
    /// What the image file occupies, in bytes, if that is known.
    pub(super) actual_size: Option<u64>,
    backing_file: Option<String>,
}

/// An export as `query-block-exports` describes it: always `id`, `type`, `node-name`.
pub(super) type Export = Map<String, Value>;

/// The layers under one node, the active layer first.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) exports: Vec<Export>,
    pub(super) layers: Vec<Layer>,
}

pub(super) fn run(arguments: &ChainArguments) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
    let state = State::query(&mut client)?;
    let chains = state.chains(&arguments.targets)?;
    Ok(Outcome::text(match arguments.output {
        Output::Human => picture::draw(&chains),
        Output::Json => format!("{:#}\n", to_json(&chains)),
    }))
}

/// What an instance has.
pub(super) struct State {
    pub(super) layers: Vec<Layer>,
    pub(super) exports: Vec<Export>,
}

impl State {
    pub(super) fn query(client: &mut QmpClient) -> Result<State> {
        let flat = Map::from_iter([("flat".to_string(), Value::Bool(true))]);
        let nodes = client.execute("query-named-block-nodes", flat)?;
        let exports = client.execute("query-block-exports", Map::new())?;
        State::read(&nodes, &exports)
    }

    fn read(nodes: &Value, exports: &Value) -> Result<State> {
        let layers: Option<Vec<Layer>> = nodes
            .as_array()
            .and_then(|nodes| nodes.iter().map(Layer::read).collect());
        let exports: Option<Vec<Export>> = exports.as_array().and_then(|exports| {
            exports
                .iter()
                .map(|export| export.as_object().cloned())
                .collect()
        });
        match (layers, exports) {
            (Some(layers), Some(exports)) => Ok(State { layers, exports }),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "the answer about nodes or exports is not understood",
            )),
        }
    }

    /// The chains under `targets`, or all.
    pub(super) fn chains(&self, targets: &[String]) -> Result<Vec<Chain>> {
        let roots = match targets.is_empty() {
            true => self.roots(),
            false => targets.iter().map(|target| self.node_of(target)).collect(),
        };
        roots.iter().map(|root| self.chain(root)).collect()
    }

    /// The node-name that is meant by the path of a device, the id of an export or a node-name.
    pub(super) fn node_of(&self, target: &str) -> String {
        let means = |export: &&Export| {
            text_of(export, "device") == target || text_of(export, "id") == target
        };
        let is_node = self.layers.iter().any(|layer| layer.node_name == target);
        match self.exports.iter().find(means) {
            Some(export) if !is_node => text_of(export, "node-name").to_string(),
            _ => target.to_string(),
        }
    }

    fn roots(&self) -> Vec<String> {
        let exported = self.exported();
        match exported.is_empty() {
            true => self.unused(),
            false => exported,
        }
    }

    /// The exported nodes, the oldest export first, each once.
    pub(super) fn exported(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for export in self.exports.iter().rev() {
            let name = text_of(export, "node-name");
            if !names.iter().any(|known| known == name) {
                names.push(name.to_string());
            }
        }
        names
    }

    /// Formats that are no other node's backing file.
    fn unused(&self) -> Vec<String> {
        let used = |layer: &Layer| {
            let file = Some(&layer.file);
            self.layers
                .iter()
                .any(|other| other.backing_file.as_ref() == file)
        };
        self.layers
            .iter()
            .filter(|layer| !layer.is_protocol() && !used(layer))
            .map(|layer| layer.node_name.clone())
            .collect()
    }

    fn chain(&self, root: &str) -> Result<Chain> {
        let missing = || {
            let text = format!("Cannot find node '{root}'");
            Error::new(ErrorKind::NotFound, text)
        };
        let found = self.layers.iter().find(|layer| layer.node_name == root);
        let mut layers = vec![found.ok_or_else(missing)?.clone()];
        while let Some(next) = self.backing_of(&layers) {
            layers.push(next.clone());
        }
        let of_root = |export: &&Export| text_of(export, "node-name") == root;
        let exports = self.exports.iter().rev().filter(of_root).cloned().collect();
        Ok(Chain { exports, layers })
    }

    /// The backing node of the last layer; never one that is in the chain already.
    fn backing_of(&self, layers: &[Layer]) -> Option<&Layer> {
        let wanted = layers.last()?.backing_file.as_ref()?;
        let in_chain = |layer: &&Layer| {
            layers
                .iter()
                .any(|known| known.node_name == layer.node_name)
        };
        let mut candidates: Vec<&Layer> = self
            .layers
            .iter()
            .filter(|layer| layer.file == *wanted && !in_chain(layer))
            .collect();
        candidates.sort_by_key(|layer| layer.is_protocol());
        candidates.first().copied()
    }
}

impl Layer {
    fn read(node: &Value) -> Option<Layer> {
        let text = |name| node.get(name).and_then(Value::as_str).map(str::to_string);
        let image = node.get("image")?;
        Some(Layer {
            node_name: text("node-name")?,
            driver: text("drv")?,
            file: text("file")?,
            read_only: node.get("ro")?.as_bool()?,
            virtual_size: image.get("virtual-size")?.as_u64()?,
            actual_size: image.get("actual-size").and_then(Value::as_u64),
            backing_file: text("backing_file"),
        })
    }

    fn is_protocol(&self) -> bool {
        PROTOCOLS.contains(&self.driver.as_str())
    }

    fn to_json(&self) -> Value {
        let mut value = json!({
            "node-name": self.node_name,
            "driver": self.driver,
            "filename": self.file,
            "read-only": self.read_only,
            "virtual-size": self.virtual_size,
        });
        if let Some(size) = self.actual_size {
            value["actual-size"] = size.into();
        }
        value
    }
}

/// A string member, empty if it is not there.
pub(super) fn text_of<'a>(export: &'a Export, name: &str) -> &'a str {
    export.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn to_json(chains: &[Chain]) -> Value {
    let chain = |chain: &Chain| {
        let layers: Vec<Value> = chain.layers.iter().map(Layer::to_json).collect();
        json!({"exports": chain.exports, "layers": layers})
    };
    chains.iter().map(chain).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn node(name: &str, driver: &str, file: &str, backing: Option<&str>) -> Value {
        let mut node = json!({
            "node-name": name, "drv": driver, "file": file, "ro": backing.is_none(),
            "image": {"virtual-size": 8 << 20, "actual-size": 196 << 10},
        });
        if let Some(backing) = backing {
            node["backing_file"] = backing.into();
        }
        node
    }

    /// The chain A <- B <- C with a file node under each layer, as QEMU lists it.
    pub(in crate::cli) fn three_layers(exports: Value) -> State {
        let nodes = json!([
            node("node-C", "qcow2", "c.qcow2", Some("b.qcow2")),
            node("#block2", "file", "c.qcow2", None),
            node("node-B", "qcow2", "b.qcow2", Some("./a.raw")),
            node("#block1", "file", "b.qcow2", None),
            node("file", "file", "./a.raw", None),
            node("node-A", "raw", "./a.raw", None),
        ]);
        State::read(&nodes, &exports).unwrap()
    }

    pub(in crate::cli) fn exported() -> Value {
        json!([{
            "id": "exp0", "type": "ublk", "node-name": "node-C", "device": "/dev/ublkb0",
            "zero-copy": true,
        }])
    }

    fn names(chain: &Chain) -> Vec<&str> {
        chain
            .layers
            .iter()
            .map(|layer| layer.node_name.as_str())
            .collect()
    }

    #[test]
    fn layers_follow_their_backing_files_and_formats_go_before_protocols() {
        for exports in [exported(), json!([])] {
            let chains = three_layers(exports).chains(&[]).unwrap();
            assert_eq!(chains.len(), 1);
            assert_eq!(names(&chains[0]), ["node-C", "node-B", "node-A"]);
        }
    }

    #[test]
    fn a_chain_may_start_anywhere_but_not_nowhere() {
        let state = three_layers(exported());
        let chains = state.chains(&["node-B".into()]).unwrap();
        assert_eq!(names(&chains[0]), ["node-B", "node-A"]);
        assert!(chains[0].exports.is_empty());
        let error = state.chains(&["x".into()]).unwrap_err();
        assert_eq!(error.message(), "Cannot find node 'x'");
    }

    #[test]
    fn a_chain_may_be_named_by_its_device_or_export() {
        let state = three_layers(exported());
        for target in ["/dev/ublkb0", "exp0", "node-C"] {
            assert_eq!(state.node_of(target), "node-C");
        }
        assert_eq!(state.node_of("x"), "x");
    }

    #[test]
    fn two_exports_of_one_node_are_one_chain() {
        let exports = json!([
            {"id": "b", "type": "nbd", "node-name": "node-C"},
            {"id": "a", "type": "nbd", "node-name": "node-C"},
        ]);
        let chains = three_layers(exports).chains(&[]).unwrap();
        assert_eq!(chains.len(), 1);
        let ids: Vec<&str> = chains[0].exports.iter().map(|e| text_of(e, "id")).collect();
        assert_eq!(ids, ["a", "b"]);
    }

    #[test]
    fn files_that_name_each_other_do_not_loop() {
        let nodes = json!([
            node("a", "qcow2", "a.qcow2", Some("b.qcow2")),
            node("b", "qcow2", "b.qcow2", Some("a.qcow2")),
        ]);
        let state = State::read(&nodes, &json!([])).unwrap();
        assert_eq!(names(&state.chain("a").unwrap()), ["a", "b"]);
    }

    #[test]
    fn json_names_every_layer() {
        let chains = three_layers(exported()).chains(&[]).unwrap();
        let value = to_json(&chains);
        assert_eq!(value[0]["exports"], exported());
        let wanted = json!({
            "node-name": "node-A", "driver": "raw", "filename": "./a.raw", "read-only": true,
            "virtual-size": 8 << 20, "actual-size": 196 << 10,
        });
        assert_eq!(value[0]["layers"][2], wanted);
    }

    #[test]
    fn an_answer_of_another_shape_is_an_error() {
        assert!(State::read(&json!([{"drv": "x"}]), &json!([])).is_err());
        assert!(State::read(&json!([]), &json!({})).is_err());
    }
}

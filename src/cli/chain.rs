//! `liveblk chain`: chains put together from what a running instance says about its nodes.
//!
//! QMP lists nodes without their edges; those, and where jobs are, come from the block graph. What a job has
//! put into a chain is no layer: the job itself is shown in its place.

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::args::{ChainArguments, Output};
use super::block_graph::BlockGraph;
use super::job_view::{self, JobView};
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint, picture};

/// Drivers whose nodes are a format's file and no layer by themselves.
const PROTOCOLS: &[&str] = &["file", "host_device", "nbd", "null-co"];

/// Drivers whose nodes change the traffic to what is below them and show that.
const FILTERS: &[&str] = &[
    "blkdebug",
    "commit_top",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
];

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
}

/// An export as `query-block-exports` describes it: always `id`, `type`, `node-name`.
pub(super) type Export = Map<String, Value>;

/// The layers under one node, the active layer first.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) exports: Vec<Export>,
    pub(super) layers: Vec<Layer>,
    pub(super) jobs: Vec<PlacedJob>,
}

/// A job that works on a chain.
#[derive(Debug)]
pub(super) struct PlacedJob {
    pub(super) job: JobView,
    /// How many layers are above it.
    pub(super) layers_above: usize,
    /// The node that it copies to, if that is known.
    pub(super) target: Option<String>,
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
    graph: BlockGraph,
    jobs: Vec<JobView>,
}

impl State {
    pub(super) fn query(client: &mut QmpClient) -> Result<State> {
        let flat = Map::from_iter([("flat".to_string(), Value::Bool(true))]);
        let nodes = client.execute("query-named-block-nodes", flat)?;
        let exports = client.execute("query-block-exports", Map::new())?;
        let graph = BlockGraph::read(&client.execute("x-debug-query-block-graph", Map::new())?)?;
        State::read(&nodes, &exports, graph, job_view::query(client)?)
    }

    fn read(
        nodes: &Value,
        exports: &Value,
        graph: BlockGraph,
        jobs: Vec<JobView>,
    ) -> Result<State> {
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
            (Some(layers), Some(exports)) => Ok(State {
                layers,
                exports,
                graph,
                jobs,
            }),
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

    /// What stands on no other node's way to data.
    fn unused(&self) -> Vec<String> {
        self.layers
            .iter()
            .filter(|layer| !layer.is_protocol() && !self.graph.is_below(&layer.node_name))
            .map(|layer| layer.node_name.clone())
            .collect()
    }

    fn chain(&self, root: &str) -> Result<Chain> {
        if self.find(root).is_none() {
            let text = format!("Cannot find node '{root}'");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let of_root = |export: &&Export| text_of(export, "node-name") == root;
        let mut chain = Chain {
            exports: self.exports.iter().rev().filter(of_root).cloned().collect(),
            layers: Vec::new(),
            jobs: Vec::new(),
        };
        let mut next = Some(root);
        while let Some(layer) = next.and_then(|name| self.find(name)) {
            self.place_jobs(&layer.node_name, &mut chain);
            if !self.is_put_by_job(layer) {
                chain.layers.push(layer.clone());
            }
            next = self.graph.below(&layer.node_name, layer.is_filter());
        }
        Ok(chain)
    }

    fn find(&self, node: &str) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.node_name == node)
    }

    /// Adds the jobs that work on `node` and on nothing above it.
    fn place_jobs(&self, node: &str, chain: &mut Chain) {
        for id in self.graph.jobs_on(node) {
            let is_placed = chain.jobs.iter().any(|placed| placed.job.id == id);
            let job = self.jobs.iter().find(|job| job.id == id);
            if let Some(job) = job.filter(|_| !is_placed) {
                chain.jobs.push(PlacedJob {
                    job: job.clone(),
                    layers_above: chain.layers.len(),
                    target: self.graph.target_of(id).map(str::to_string),
                });
            }
        }
    }

    fn is_put_by_job(&self, layer: &Layer) -> bool {
        match &*layer.driver {
            "commit_top" | "mirror_top" => true,
            "copy-on-read" | "copy-before-write" => self.graph.is_main_node(&layer.node_name),
            _ => false,
        }
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
        })
    }

    fn is_protocol(&self) -> bool {
        PROTOCOLS.contains(&self.driver.as_str())
    }

    fn is_filter(&self) -> bool {
        FILTERS.contains(&self.driver.as_str())
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

impl PlacedJob {
    fn to_json(&self) -> Value {
        let mut value = self.job.to_json();
        value["layers-above"] = self.layers_above.into();
        if let Some(target) = &self.target {
            value["target"] = target.as_str().into();
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
        let jobs: Vec<Value> = chain.jobs.iter().map(PlacedJob::to_json).collect();
        json!({"exports": chain.exports, "layers": layers, "jobs": jobs})
    };
    chains.iter().map(chain).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::block_graph::tests::answer;
    use super::super::job_view::tests::job;
    use super::*;

    fn node(name: &str, driver: &str, file: &str, read_only: bool) -> Value {
        json!({
            "node-name": name, "drv": driver, "file": file, "ro": read_only,
            "image": {"virtual-size": 8 << 20, "actual-size": 196 << 10},
        })
    }

    const CHAIN: [(&str, &str, &str); 5] = [
        ("node-C", "file", "#block2"),
        ("node-C", "backing", "node-B"),
        ("node-B", "file", "#block1"),
        ("node-B", "backing", "node-A"),
        ("node-A", "file", "file"),
    ];

    /// The chain A <- B <- C with a file node under each layer, as QEMU lists it, and `more` of it.
    fn state(
        exports: &Value,
        more: &[Value],
        edges: &[(&str, &str, &str)],
        jobs: Vec<JobView>,
    ) -> State {
        let mut nodes = more.to_vec();
        nodes.extend([
            node("node-C", "qcow2", "c.qcow2", false),
            node("#block2", "file", "c.qcow2", true),
            node("node-B", "qcow2", "b.qcow2", false),
            node("#block1", "file", "b.qcow2", true),
            node("file", "file", "./a.raw", true),
            node("node-A", "raw", "./a.raw", true),
        ]);
        let graph = BlockGraph::read(&answer(&[&CHAIN[..], edges].concat())).unwrap();
        State::read(&nodes.into(), exports, graph, jobs).unwrap()
    }

    pub(in crate::cli) fn three_layers(exports: Value) -> State {
        state(&exports, &[], &[], Vec::new())
    }

    /// B is being committed into A, and C is exported.
    pub(in crate::cli) fn committing() -> State {
        let edges = [
            ("node-C", "backing", "#block9"),
            ("#block9", "backing", "node-B"),
            ("job:commit0", "main node", "node-C"),
            ("job:commit0", "intermediate node", "node-B"),
            ("job:commit0", "base", "node-A"),
        ];
        let filter = node("#block9", "commit_top", "b.qcow2", true);
        let mut all = CHAIN.to_vec();
        all.remove(1);
        let mut state = state(
            &exported(),
            &[filter],
            &[],
            vec![job("commit0", "running", 3, 7)],
        );
        state.graph = BlockGraph::read(&answer(&[&all[..], &edges].concat())).unwrap();
        state
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
    fn layers_follow_their_backing_edges_down_to_the_last_format() {
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
    fn a_job_stands_where_its_filter_is_and_the_filter_is_no_layer() {
        let chains = committing().chains(&[]).unwrap();
        assert_eq!(names(&chains[0]), ["node-C", "node-B", "node-A"]);
        let placed = &chains[0].jobs[0];
        assert_eq!(placed.layers_above, 1);
        let job = &to_json(&chains)[0]["jobs"][0];
        assert_eq!(
            (&job["id"], &job["percent"], &job["target"]),
            (&json!("commit0"), &json!(42), &json!("node-A"))
        );
    }

    #[test]
    fn a_filter_of_a_stream_is_no_layer_but_one_of_a_user_is() {
        let filter = node("cor", "copy-on-read", "c.qcow2", false);
        let exports = json!([{"id": "a", "type": "nbd", "node-name": "cor"}]);
        let mut edges = vec![("cor", "file", "node-C")];
        let own = state(&exports, std::slice::from_ref(&filter), &edges, Vec::new());
        assert_eq!(names(&own.chains(&[]).unwrap()[0])[..2], ["cor", "node-C"]);
        edges.extend([
            ("job:s", "main node", "cor"),
            ("job:s", "active node", "node-C"),
        ]);
        let streamed = state(&exports, &[filter], &edges, vec![job("s", "running", 0, 1)]);
        let chain = &streamed.chains(&[]).unwrap()[0];
        assert_eq!(names(chain), ["node-C", "node-B", "node-A"]);
        assert_eq!(chain.jobs[0].layers_above, 0);
        assert_eq!(chain.exports.len(), 1);
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
        assert_eq!(value[0]["jobs"], json!([]));
    }

    #[test]
    fn an_answer_of_another_shape_is_an_error() {
        let read = |nodes: Value, exports: Value| {
            State::read(&nodes, &exports, BlockGraph::default(), Vec::new())
        };
        assert!(read(json!([{"drv": "x"}]), json!([])).is_err());
        assert!(read(json!([]), json!({})).is_err());
    }
}

//! The edges between nodes, and what jobs hold of them, as `x-debug-query-block-graph` tells.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};

/// An edge from a node, or from a job, to a node.
#[derive(Debug)]
struct Edge {
    parent: String,
    child: String,
    role: String,
}

/// All edges of an instance's graph but those of exports.
#[derive(Debug, Default)]
pub(super) struct BlockGraph {
    between_nodes: Vec<Edge>,
    of_jobs: Vec<Edge>,
}

impl BlockGraph {
    /// From the command's answer.
    ///
    /// # Errors
    /// It has another shape.
    pub(super) fn read(answer: &Value) -> Result<BlockGraph> {
        read(answer).ok_or_else(|| {
            let text = "the answer about the block graph is not understood";
            Error::new(ErrorKind::Unsupported, text)
        })
    }

    /// The node that shows through `node`: a format's backing node, or what a filter filters.
    pub(super) fn below(&self, node: &str, is_filter: bool) -> Option<&str> {
        let child = |role: &str| {
            let edges = &self.between_nodes;
            edges
                .iter()
                .find(|edge| edge.parent == node && edge.role == role)
        };
        let filtered = || child("file").filter(|_| is_filter);
        child("backing")
            .or_else(filtered)
            .map(|edge| edge.child.as_str())
    }

    /// Some other node stands on this one.
    pub(super) fn is_below(&self, node: &str) -> bool {
        self.between_nodes.iter().any(|edge| edge.child == node)
    }

    /// The jobs that work on a node, not those that it is only their device.
    pub(super) fn jobs_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a str> {
        self.of_jobs
            .iter()
            .filter(move |edge| edge.child == node && edge.role != MAIN)
            .map(|edge| edge.parent.as_str())
    }

    /// A job has put it there, or works for it.
    pub(super) fn is_main_node(&self, node: &str) -> bool {
        let edges = &self.of_jobs;
        edges
            .iter()
            .any(|edge| edge.child == node && edge.role == MAIN)
    }

    /// The node that a job copies to.
    pub(super) fn target_of(&self, job: &str) -> Option<&str> {
        let to = |edge: &&Edge| matches!(&*edge.role, "base" | "target" | "active node");
        let mut edges = self.of_jobs.iter().filter(|edge| edge.parent == job);
        edges.find(to).map(|edge| edge.child.as_str())
    }
}

const MAIN: &str = "main node";

fn read(answer: &Value) -> Option<BlockGraph> {
    let nodes = answer["nodes"].as_array()?;
    let mut graph = BlockGraph::default();
    for edge in answer["edges"].as_array()? {
        let end = |which: &str| nodes.iter().find(|node| node["id"] == edge[which]);
        let (parent, child) = (end("parent")?, end("child")?);
        let name = |node: &Value| Some(node["name"].as_str()?.to_string());
        let kind = parent["type"].as_str()?;
        let edge = Edge {
            parent: name(parent)?,
            child: name(child)?,
            role: edge["name"].as_str()?.to_string(),
        };
        match kind {
            "block-driver" => graph.between_nodes.push(edge),
            "block-job" => graph.of_jobs.push(edge),
            _ => {}
        }
    }
    Some(graph)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// An answer made of `(parent, role, child)`; a parent `job:ID` is a job, `user` an export.
    pub(in crate::cli) fn answer(edges: &[(&str, &str, &str)]) -> Value {
        let mut names: Vec<&str> = Vec::new();
        for (parent, _, child) in edges {
            for name in [*parent, *child] {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        let node = |(id, name): (usize, &&str)| match name.strip_prefix("job:") {
            Some(job) => json!({"id": id, "type": "block-job", "name": job}),
            None if *name == "user" => json!({"id": id, "type": "block-backend", "name": ""}),
            None => json!({"id": id, "type": "block-driver", "name": name}),
        };
        let nodes: Vec<Value> = names.iter().enumerate().map(node).collect();
        let id = |name: &str| names.iter().position(|known| *known == name);
        let edge = |(parent, role, child): &(&str, &str, &str)| json!({"parent": id(parent), "name": role, "child": id(child)});
        let edges: Vec<Value> = edges.iter().map(edge).collect();
        json!({"nodes": nodes, "edges": edges})
    }

    #[test]
    fn filters_and_formats_show_what_is_below_them() {
        let graph = BlockGraph::read(&answer(&[
            ("user", "root", "cor"),
            ("cor", "file", "top"),
            ("top", "file", "f"),
            ("top", "backing", "base"),
            ("base", "file", "g"),
        ]))
        .unwrap();
        assert_eq!(graph.below("cor", true), Some("top"));
        assert_eq!(graph.below("top", false), Some("base"));
        assert_eq!(graph.below("base", false), None);
        assert!(graph.is_below("top") && !graph.is_below("cor"));
    }

    #[test]
    fn a_job_is_on_what_it_copies_not_on_its_device() {
        let graph = BlockGraph::read(&answer(&[
            ("job:j", "main node", "d"),
            ("job:j", "intermediate node", "c"),
            ("job:j", "base", "b"),
        ]))
        .unwrap();
        assert_eq!(graph.jobs_on("d").count(), 0);
        assert_eq!(graph.jobs_on("c").collect::<Vec<_>>(), ["j"]);
        assert_eq!(graph.target_of("j"), Some("b"));
        assert!(graph.is_main_node("d") && !graph.is_main_node("c"));
    }

    #[test]
    fn an_answer_of_another_shape_is_an_error() {
        assert!(BlockGraph::read(&json!({})).is_err());
        let dangling = json!({"nodes": [], "edges": [{"parent": 1, "child": 2, "name": "file"}]});
        assert!(BlockGraph::read(&dangling).is_err());
    }
}

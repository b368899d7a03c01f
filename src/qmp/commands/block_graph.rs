//! `x-debug-query-block-graph`: nodes, users and edges with their permissions.

use std::collections::HashMap;
use std::rc::Rc;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::block::{Child, Node, Permission, Role};

/// Users get the first numbers, jobs the next, then nodes from the oldest on, but what a user or a job is on
/// right after it.
pub(super) fn query(context: &Context) -> Outcome {
    let nodes = context.graph.nodes();
    let all = |edges: fn(&Node) -> Vec<Rc<Child>>| -> Vec<Rc<Child>> {
        nodes.iter().flat_map(|node| edges(node)).collect()
    };
    let mut above = all(Node::parents);
    above.sort_by_key(|edge| edge.serial());
    let mut graph = BlockGraph::default();
    for edge in above.iter().filter(|edge| is_user(edge)) {
        graph.add_user(edge);
    }
    for (job, edges) in jobs(&above) {
        graph.add_job(&job, &edges);
    }
    for node in nodes.iter().rev() {
        graph.add_node(node);
    }
    for edge in all(Node::children) {
        graph.add_edge(&edge);
    }
    // QEMU lists the newest node first, then jobs, users last.
    graph.nodes.reverse();
    graph.users.reverse();
    graph.nodes.append(&mut graph.users);
    graph.user_edges.reverse();
    graph.edges.append(&mut graph.user_edges);
    Ok(json!({"nodes": graph.nodes, "edges": graph.edges}))
}

/// From outside the graph and not only to keep others off.
fn is_user(edge: &Child) -> bool {
    is_of_mirror(edge) || (edge.is_root() && edge.job().is_none())
}

/// QEMU's jobs write to their target by themselves, where ours do so through their filter.
fn is_of_mirror(edge: &Child) -> bool {
    edge.role() == Role::Target
        && edge
            .parent_node()
            .is_some_and(|parent| parent.driver().driver_name() == "mirror_top")
}

/// The jobs, oldest first, each with the edges by which it keeps others off nodes, oldest first.
fn jobs(edges: &[Rc<Child>]) -> Vec<(String, Vec<Rc<Child>>)> {
    let mut jobs: Vec<(String, Vec<Rc<Child>>)> = Vec::new();
    for edge in edges {
        let Some(job) = edge.job() else { continue };
        match jobs.iter_mut().find(|(known, _)| *known == job) {
            Some((_, edges)) => edges.push(edge.clone()),
            None => jobs.push((job, vec![edge.clone()])),
        }
    }
    jobs
}

#[derive(Default)]
struct BlockGraph {
    nodes: Vec<Value>,
    users: Vec<Value>,
    edges: Vec<Value>,
    user_edges: Vec<Value>,
    numbers: HashMap<String, usize>,
    last: usize,
}

impl BlockGraph {
    fn add_user(&mut self, edge: &Child) {
        self.last += 1;
        let user = self.last;
        self.users
            .push(json!({"id": user, "type": "block-backend", "name": ""}));
        self.add_user_edge(edge, user, Role::Root);
    }

    fn add_job(&mut self, job: &str, edges: &[Rc<Child>]) {
        self.last += 1;
        let number = self.last;
        self.users
            .push(json!({"id": number, "type": "block-job", "name": job}));
        for edge in edges.iter().rev() {
            self.add_user_edge(edge, number, edge.role());
        }
    }

    fn add_user_edge(&mut self, child: &Child, user: usize, role: Role) {
        let node = self.number(&child.node());
        self.user_edges.push(edge(child, user, node, role));
    }

    fn add_node(&mut self, node: &Node) {
        let number = self.number(node);
        self.nodes
            .push(json!({"id": number, "type": "block-driver", "name": node.name()}));
    }

    fn add_edge(&mut self, child: &Child) {
        let Some(parent) = child.parent_node().filter(|_| !is_of_mirror(child)) else {
            return;
        };
        let (parent, node) = (self.number(&parent), self.number(&child.node()));
        let edge = edge(child, parent, node, child.role());
        self.edges.push(edge);
    }

    fn number(&mut self, node: &Node) -> usize {
        let last = &mut self.last;
        *self.numbers.entry(node.name().into()).or_insert_with(|| {
            *last += 1;
            *last
        })
    }
}

fn edge(child: &Child, parent: usize, node: usize, role: Role) -> Value {
    let permissions = child.permissions();
    json!({
        "parent": parent,
        "child": node,
        "name": role.name(),
        "perm": names(permissions.required),
        "shared-perm": names(permissions.shared),
    })
}

/// The names as queries spell them, in the order in which QEMU lists them.
fn names(permissions: Permission) -> Vec<&'static str> {
    [
        (Permission::RESIZE, "resize"),
        (Permission::WRITE_UNCHANGED, "write-unchanged"),
        (Permission::WRITE, "write"),
        (Permission::CONSISTENT_READ, "consistent-read"),
    ]
    .into_iter()
    .filter(|(flag, _)| permissions.contains(*flag))
    .map(|(_, name)| name)
    .collect()
}

//! `x-debug-query-block-graph`: nodes, users and edges with their permissions.

use std::collections::HashMap;
use std::rc::Rc;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::block::{Child, Node, Permission};

/// Users get the first numbers, then nodes from the oldest on, but a user's node right after it.
pub(super) fn query(context: &Context) -> Outcome {
    let nodes = context.graph.nodes();
    let mut graph = BlockGraph::default();
    let roots: Vec<Rc<Child>> = nodes
        .iter()
        .flat_map(|node| node.parents())
        .filter(|edge| edge.is_root())
        .collect();
    for root in roots.iter().rev() {
        graph.add_user(root);
    }
    for node in nodes.iter().rev() {
        graph.add_node(node);
    }
    for edge in nodes.iter().flat_map(|node| node.children()) {
        graph.add_edge(&edge);
    }
    // QEMU lists the newest node first, users last.
    graph.users.reverse();
    graph.nodes.reverse();
    graph.nodes.append(&mut graph.users);
    graph.edges.append(&mut graph.user_edges);
    Ok(json!({"nodes": graph.nodes, "edges": graph.edges}))
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
    fn add_user(&mut self, root: &Child) {
        self.last += 1;
        let user = self.last;
        self.users
            .push(json!({"id": user, "type": "block-backend", "name": ""}));
        let node = self.number(&root.node());
        let edge = edge(root, user, node);
        self.user_edges.push(edge);
    }

    fn add_node(&mut self, node: &Node) {
        let number = self.number(node);
        self.nodes
            .push(json!({"id": number, "type": "block-driver", "name": node.name()}));
    }

    fn add_edge(&mut self, child: &Child) {
        let Some(parent) = child.parent_node() else {
            return;
        };
        let (parent, node) = (self.number(&parent), self.number(&child.node()));
        let edge = edge(child, parent, node);
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

fn edge(child: &Child, parent: usize, node: usize) -> Value {
    let permissions = child.permissions();
    json!({
        "parent": parent,
        "child": node,
        "name": child.role().name(),
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

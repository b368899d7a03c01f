//! The file name of a node as queries show it and as overlays' headers get it.
//!
//! A plain name where opening that name, as this node's format, would give just this tree; else
//! `json:` with the options of the whole tree.

use std::fmt::Write as _;
use std::rc::Rc;

use crate::block::{Child, Graph, Node, Role};
use crate::protocol::file::Identity;
use crate::protocol::nbd::NbdAddress;

use super::backing_name::{combine, file_below};
use super::chain::{header_reference, identity_of};
use super::description::{DriverOptions, NullDescription};
use super::filter_description::FilterOptions;
use super::nbd_description::NbdDescription;
use super::origin::Origin;
use super::value::Value;

/// Sets the name of `node` and, where it changes, of the nodes above that are called after it.
pub(super) fn refresh(node: &Node) {
    let name = name_of(node);
    if name == node.file_name() {
        return;
    }
    node.set_file_name(name);
    for edge in node.parents() {
        if let Some(parent) = edge.parent_node() {
            refresh(&parent);
        }
    }
}

/// Sets the names of all nodes. A node whose child was replaced has another name although nothing below
/// was renamed.
pub(super) fn refresh_all(graph: &Graph) {
    for node in graph.nodes() {
        refresh(&node);
    }
}

/// What an overlay's header gets as the name of `node`: its plain file name where that means the same
/// tree, also where a header spells a name in another way (`a` and `./a`).
pub(super) fn for_header(node: &Node) -> String {
    let name = node.file_name();
    if !name.starts_with("json:") || !headers_agree(node) {
        return name;
    }
    match file_below(node) {
        Some(file) => file.file_name(),
        None => name,
    }
}

/// Opening the file by name gives the files that are attached, all the way down.
fn headers_agree(node: &Node) -> bool {
    let Some(origin) = Origin::of(node) else {
        return false;
    };
    match &origin.given.borrow().driver {
        DriverOptions::Raw { part, .. } if !part.is_whole() => return false,
        _ => {}
    }
    if node.driver().is_filter() {
        return false;
    }
    let Some(below) = node.child(Role::File) else {
        return true;
    };
    if !below.node().children().is_empty() {
        return false;
    }
    let named = header_reference(node).map(|reference| combine(node, &reference.file));
    let attached = node.child(Role::Backing);
    let attached = attached.map(|edge| edge.node().without_implicit_filters());
    match (named, attached) {
        (None, None) => true,
        (Some(name), Some(backing)) => {
            let file = identity_of(&backing);
            file.is_some() && Identity::of_path(&name).ok() == file && headers_agree(&backing)
        }
        _ => false,
    }
}

/// Something else is attached as backing file than opening the image by its name would attach.
pub(super) fn is_overridden(node: &Node) -> bool {
    let Some(origin) = Origin::of(node) else {
        return false;
    };
    let automatic = origin.automatic_backing.borrow();
    let attached = node.child(Role::Backing);
    let attached = attached.map(|edge| edge.node().file_name());
    *automatic != attached
}

/// A filter that a job put in is called after what it filters if it has no name of its own, or sits on
/// a backing edge.
fn name_of(node: &Node) -> String {
    let unseen = |edge: &Rc<Child>| node.is_implicit() || edge.role() == Role::Backing;
    if let Some(edge) = node.filtered().filter(unseen) {
        return edge.node().file_name();
    }
    match plain_name(node) {
        Some(name) => name,
        None => format!("json:{}", tree_of(node)),
    }
}

/// The name that says it all.
fn plain_name(node: &Node) -> Option<String> {
    let origin = Origin::of(node)?;
    let given = origin.given.borrow();
    match &given.driver {
        DriverOptions::File(file) => Some(file.filename.clone()),
        DriverOptions::Null(null) => null_name(null),
        DriverOptions::Nbd(nbd) => Some(nbd.file_name()),
        DriverOptions::Filter(filter) => filter_name(node, &filter.options),
        DriverOptions::Raw { part, .. } if !part.is_whole() => None,
        _ if is_overridden(node) => None,
        _ => {
            let below = node.child(Role::File)?.node();
            let is_protocol = below.children().is_empty();
            let name = below.file_name();
            (is_protocol && !name.starts_with("json:")).then_some(name)
        }
    }
}

/// `blkdebug` without anything but a file of rules has one: `blkdebug:RULES:IMAGE`. What has to do with
/// snapshots goes by its child's.
fn filter_name(node: &Node, options: &FilterOptions) -> Option<String> {
    let given = match options {
        FilterOptions::Blkdebug(given) => given,
        FilterOptions::CopyBeforeWrite(_) | FilterOptions::SnapshotAccess => {
            return Some(node.child(Role::File)?.node().file_name());
        }
        _ => return None,
    };
    let image = node.filtered()?.node().file_name();
    let plain = given.given().is_empty() && !image.starts_with("json:");
    let config = given.config.as_deref().unwrap_or_default();
    plain.then(|| format!("blkdebug:{config}:{image}"))
}

fn null_name(null: &NullDescription) -> Option<String> {
    let is_plain = null.size.is_none() && null.read_zeroes.is_none();
    is_plain.then(|| format!("{}://", null.driver_name))
}

/// The options that make the tree, as JSON text.
fn tree_of(node: &Node) -> String {
    let Some(origin) = Origin::of(node) else {
        return filter_tree(node);
    };
    let given = origin.given.borrow();
    let mut tree = Members::default();
    match &given.driver {
        DriverOptions::File(file) => {
            tree.text("driver", file.kind.name());
            tree.text("filename", &file.filename);
        }
        DriverOptions::Nbd(nbd) => nbd_tree(&mut tree, nbd),
        DriverOptions::Null(null) => {
            tree.optional("read-zeroes", null.read_zeroes);
            tree.text("driver", null.driver_name);
            tree.optional("size", null.size);
        }
        DriverOptions::Raw { part, .. } => {
            tree.optional("offset", Some(part.offset).filter(|offset| *offset != 0));
            tree.text("driver", "raw");
            tree.optional("size", part.size);
            tree.child(node, Role::File);
        }
        DriverOptions::Qcow2 { .. } => {
            if is_overridden(node) {
                tree.child(node, Role::Backing);
            }
            tree.text("driver", "qcow2");
            tree.child(node, Role::File);
        }
        DriverOptions::Filter(filter) => {
            if let FilterOptions::Throttle { group } = &filter.options {
                tree.text("throttle-group", group);
            }
            tree.text("driver", filter.name());
            tree.child(node, filter.role());
            if let FilterOptions::Blkdebug(given) = &filter.options {
                tree.optional_text("config", given.config.as_deref());
                for (key, value) in given.given() {
                    tree.value(key, value);
                }
            }
        }
    }
    tree.finish()
}

/// Members in QEMU's order; the server flat.
fn nbd_tree(tree: &mut Members, nbd: &NbdDescription) {
    match &nbd.address {
        NbdAddress::Unix(path) => tree.text("server.path", path),
        NbdAddress::Inet { host, .. } => tree.text("server.host", host),
    }
    tree.text("driver", "nbd");
    tree.optional_text("export", nbd.export.as_deref());
    match &nbd.address {
        NbdAddress::Unix(_) => tree.text("server.type", "unix"),
        NbdAddress::Inet { port, .. } => {
            tree.text("server.type", "inet");
            tree.text("server.port", &port.to_string());
        }
    }
}

/// A filter that a job put in has what it filters and nothing else.
fn filter_tree(node: &Node) -> String {
    let mut tree = Members::default();
    tree.text("driver", node.driver().driver_name());
    if let Some(edge) = node.filtered() {
        tree.child(node, edge.role());
    }
    tree.finish()
}

/// Members of a JSON object.
#[derive(Default)]
struct Members(Vec<String>);

impl Members {
    fn text(&mut self, name: &str, value: &str) {
        self.0.push(format!("\"{name}\": {}", quoted(value)));
    }

    fn optional_text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    fn value(&mut self, name: &str, value: &Value) {
        match value {
            Value::Str(text) => self.text(name, text),
            Value::Bool(value) => self.optional(name, Some(value)),
            Value::Int(value) => self.optional(name, Some(value)),
            other => unreachable!("rules have no {other:?}"),
        }
    }

    fn optional(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.0.push(format!("\"{name}\": {value}"));
        }
    }

    fn child(&mut self, node: &Node, role: Role) {
        let value = match node.child(role) {
            Some(edge) => tree_of(&edge.node().without_implicit_filters()),
            None => "null".to_owned(),
        };
        self.0.push(format!("\"{}\": {value}", role.name()));
    }

    fn finish(self) -> String {
        format!("{{{}}}", self.0.join(", "))
    }
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            control if control.is_control() => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04X}", u32::from(control));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_as_json() {
        assert_eq!(quoted("a\"b\\c\n\u{1}"), r#""a\"b\\c\n\u0001""#);
    }
}

//! Node names, and finding nodes by them in the words of each command.

use std::rc::Rc;

use crate::block::{Graph, Node, Role, is_well_formed};
use crate::error::{Error, ErrorKind, Result};

use super::value::invalid;

/// Bytes in a node-name at most.
const LONGEST: usize = 31;

/// Checks the name of a new node.
///
/// # Errors
/// Malformed, too long, or taken.
pub(super) fn check_new(graph: &Graph, name: &str) -> Result<()> {
    if !is_well_formed(name) {
        return Err(invalid(format!("Invalid node-name: '{name}'")));
    }
    if graph.find(name).is_some() {
        return Err(invalid(format!("Duplicate nodes with node-name='{name}'")));
    }
    if name.len() > LONGEST {
        return Err(invalid("Node name too long"));
    }
    Ok(())
}

/// The node that an argument which may be a device or a node names.
///
/// # Errors
/// There is none.
pub fn find_either(graph: &Graph, name: &str) -> Result<Rc<Node>> {
    graph.find(name).ok_or_else(|| not_found(name, name))
}

/// The node that an argument names which takes node-names only.
///
/// # Errors
/// There is none.
pub fn find_node(graph: &Graph, name: &str) -> Result<Rc<Node>> {
    graph.find(name).ok_or_else(|| not_found("", name))
}

/// The node that two optional arguments name. There are no named devices here, so that `device`
/// finds nothing.
///
/// # Errors
/// There is none.
pub fn find_device_or_node(
    graph: &Graph,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Rc<Node>> {
    let missing = || not_found(device.unwrap_or(""), node_name.unwrap_or(""));
    match (device, node_name) {
        (None, Some(name)) => graph.find(name).ok_or_else(missing),
        _ => Err(missing()),
    }
}

/// The node that a list of nodes names.
///
/// # Errors
/// There is none.
pub fn find_listed(graph: &Graph, name: &str) -> Result<Rc<Node>> {
    graph.find(name).ok_or_else(|| {
        let message = format!("Failed to find node with node-name='{name}'");
        Error::new(ErrorKind::NotFound, message)
    })
}

fn not_found(device: &str, node_name: &str) -> Error {
    let message = format!("Cannot find device='{device}' nor node-name='{node_name}'");
    Error::new(ErrorKind::NotFound, message)
}

/// A backing file of another node is left alone, also where filters are between them, and so is what a
/// job works on.
///
/// # Errors
/// [`ErrorKind::InUse`] naming the overlay, or the kind of job.
pub fn check_not_busy(node: &Rc<Node>) -> Result<()> {
    node.check_unoccupied()?;
    match overlay_of(node) {
        None => Ok(()),
        Some(overlay) => Err(Error::new(
            ErrorKind::InUse,
            format!(
                "Node '{}' is busy: node is used as backing hd of '{}'",
                node.name(),
                overlay.name()
            ),
        )),
    }
}

/// A node whose backing file this is.
fn overlay_of(node: &Rc<Node>) -> Option<Rc<Node>> {
    node.parents().into_iter().find_map(|edge| {
        let parent = edge.parent_node()?;
        if parent.driver().is_filter() {
            return overlay_of(&parent);
        }
        (edge.role() == Role::Backing).then_some(parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_begin_with_a_letter() {
        for good in ["a", "node-A", "x.y_z-1"] {
            assert!(is_well_formed(good), "{good}");
        }
        for bad in ["", "1st", "#x", "-a", "a b", "ä"] {
            assert!(!is_well_formed(bad), "{bad}");
        }
    }

    #[test]
    fn each_kind_of_argument_has_its_own_words() {
        let graph = Graph::new();
        let text = |result: Result<Rc<Node>>| match result {
            Ok(_) => String::new(),
            Err(error) => error.message().to_owned(),
        };
        let both = find_device_or_node(&graph, Some("d"), None);
        assert_eq!(text(both), "Cannot find device='d' nor node-name=''");
        let either = find_either(&graph, "x");
        assert_eq!(text(either), "Cannot find device='x' nor node-name='x'");
        let node = find_node(&graph, "x");
        assert_eq!(text(node), "Cannot find device='' nor node-name='x'");
    }
}

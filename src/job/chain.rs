//! Walking a backing chain, and who else looks at its layers.

use std::rc::Rc;

use crate::block::{Child, Node, Permission, Role};
use crate::error::{Error, ErrorKind, Result};

/// The layers from `top` down to `base`, not including it; the whole chain without one.
pub(super) fn layers(top: &Rc<Node>, base: Option<&Rc<Node>>) -> Vec<Rc<Node>> {
    let mut layers = Vec::new();
    let mut next = Some(top.clone());
    while let Some(node) = next {
        if base.is_some_and(|base| Rc::ptr_eq(base, &node)) {
            break;
        }
        next = node.backing();
        layers.push(node);
    }
    layers
}

/// What the lowest of these layers has as its backing file, with the filters that users have put above it.
pub(super) fn attached_below(layers: &[Rc<Node>]) -> Option<Rc<Node>> {
    let edge = layers.last()?.child(Role::Backing)?;
    Some(edge.node())
}

/// No job works on a node from `top` down to `base`, not including it; nor on a filter between.
///
/// # Errors
/// [`ErrorKind::InUse`] naming the first that one works on.
pub fn check_unoccupied(top: &Rc<Node>, base: Option<&Rc<Node>>) -> Result<()> {
    let mut next = Some(top.clone());
    while let Some(node) = next.filter(|node| !base.is_some_and(|base| Rc::ptr_eq(base, node))) {
        node.check_unoccupied()?;
        next = node.below();
    }
    Ok(())
}

/// Nobody looks at what a commit changes but through the layers that are committed: an overlay beside
/// them would see its content change, and so would an export of one of them.
///
/// # Errors
/// [`ErrorKind::InUse`] naming the overlay, or the layer that is shown by itself.
pub(super) fn check_no_other_reader(layers: &[Rc<Node>], base: &Rc<Node>) -> Result<()> {
    for node in layers.iter().skip(1).chain([base]) {
        for edge in readers(node) {
            let user = match edge.parent_node() {
                Some(overlay) if layers.iter().any(|layer| Rc::ptr_eq(layer, &overlay)) => continue,
                Some(user) if edge.role() == Role::Backing => {
                    format!("the backing file of '{}'", user.name())
                }
                Some(user) => format!("the file of '{}'", user.name()),
                None => "shown by itself".to_owned(),
            };
            let message = format!(
                "Node '{}' is also {user}, whose content would change with a commit into '{}'",
                node.name(),
                base.name()
            );
            return Err(Error::new(ErrorKind::InUse, message));
        }
    }
    Ok(())
}

/// The edges, past filters, by which overlays have this node as backing file, or somebody else reads it.
fn readers(node: &Rc<Node>) -> Vec<Rc<Child>> {
    let mut found = Vec::new();
    for edge in node.parents() {
        let reads = edge
            .permissions()
            .required
            .contains(Permission::CONSISTENT_READ);
        match edge.parent_node() {
            Some(parent) if parent.driver().is_filter() => found.extend(readers(&parent)),
            Some(_) if edge.role() == Role::Backing || reads => found.push(edge),
            None if edge.follows() && reads => found.push(edge),
            _ => {}
        }
    }
    found
}

/// The node right above `lower` in the chain that starts at `top`.
pub(super) fn overlay_of(lower: &Rc<Node>, top: &Rc<Node>) -> Option<Rc<Node>> {
    layers(top, Some(lower)).pop()
}

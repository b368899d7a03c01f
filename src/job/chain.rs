//! Walking a backing chain, and who else looks at its layers.

use std::rc::Rc;

use crate::block::{Node, Role};
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
/// them would see its content change.
///
/// # Errors
/// [`ErrorKind::InUse`] naming the overlay.
pub(super) fn check_no_other_overlay(layers: &[Rc<Node>], base: &Rc<Node>) -> Result<()> {
    for node in layers.iter().skip(1).chain([base]) {
        let overlays = overlays(node);
        let other = overlays
            .iter()
            .find(|overlay| !layers.iter().any(|layer| Rc::ptr_eq(layer, overlay)));
        if let Some(other) = other {
            let (base, node, other) = (base.name(), node.name(), other.name());
            let message = format!(
                "Node '{node}' is also the backing file of '{other}', whose content would change \
                 with a commit into '{base}'"
            );
            return Err(Error::new(ErrorKind::InUse, message));
        }
    }
    Ok(())
}

/// The nodes that have this one as backing file, past filters.
fn overlays(node: &Rc<Node>) -> Vec<Rc<Node>> {
    let mut found = Vec::new();
    for edge in node.parents() {
        let Some(parent) = edge.parent_node() else {
            continue;
        };
        if parent.driver().is_filter() {
            found.extend(overlays(&parent));
        } else if edge.role() == Role::Backing {
            found.push(parent);
        }
    }
    found
}

/// The node right above `lower` in the chain that starts at `top`.
pub(super) fn overlay_of(lower: &Rc<Node>, top: &Rc<Node>) -> Option<Rc<Node>> {
    layers(top, Some(lower)).pop()
}

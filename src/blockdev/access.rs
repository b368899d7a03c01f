//! Turning nodes read-only and back, with the files that were opened for them.

use std::rc::Rc;

use crate::block::Node;
use crate::error::Result;

use super::Blockdev;
use super::origin::Origin;

impl Blockdev {
    /// Turns a node read-write with the files that were opened for it. In a drained section.
    ///
    /// # Errors
    /// The files cannot be written; nothing has changed.
    pub async fn make_writable(&self, node: &Rc<Node>) -> Result<()> {
        let nodes = with_adopted_files(node);
        set_read_only(&nodes, false);
        let refreshed = self.graph.refresh_permissions(std::slice::from_ref(node));
        let opened = match refreshed {
            Ok(()) => tell_drivers(nodes.iter().rev(), false).await,
            Err(error) => Err(error),
        };
        if let Err(error) = opened {
            set_read_only(&nodes, true);
            self.graph.refresh_permissions(std::slice::from_ref(node))?;
            return Err(error);
        }
        if let Some(origin) = Origin::of(node) {
            origin.given.borrow_mut().shared.read_only = Some(false);
        }
        Ok(())
    }

    /// Turns a node read-only with the files that were opened for it. In a drained section.
    ///
    /// # Errors
    /// The image could not be written out, or has writers; nothing has changed.
    pub async fn make_read_only(&self, node: &Rc<Node>) -> Result<()> {
        if node.options().read_only {
            return Ok(());
        }
        let nodes = with_adopted_files(node);
        tell_drivers(nodes.iter(), true).await?;
        self.tell_filters(node).await;
        set_read_only(&nodes, true);
        if let Err(error) = self.graph.refresh_permissions(std::slice::from_ref(node)) {
            set_read_only(&nodes, false);
            tell_drivers(nodes.iter().rev(), false).await?;
            return Err(error);
        }
        if let Some(origin) = Origin::of(node) {
            origin.given.borrow_mut().shared.read_only = Some(true);
        }
        Ok(())
    }
}

/// The node and the chain of `file` children that were opened for it and take its access.
fn with_adopted_files(node: &Rc<Node>) -> Vec<Rc<Node>> {
    let mut nodes = vec![node.clone()];
    let mut parent = node.clone();
    while let Some(edge) = parent.storage() {
        let child = edge.node();
        let inherits = Origin::of(&child)
            .is_some_and(|origin| origin.given.borrow().shared.read_only.is_none());
        if !inherits || !Origin::is_adopted(&parent, &child) {
            break;
        }
        nodes.push(child.clone());
        parent = child;
    }
    nodes
}

/// Drivers write out before they turn read-only, upper ones first, and get ready to write after, lower
/// ones first. Where one cannot, those before go back.
async fn tell_drivers(
    nodes: impl Iterator<Item = &Rc<Node>> + Clone,
    read_only: bool,
) -> Result<()> {
    for (told, node) in nodes.clone().enumerate() {
        if let Err(error) = node.driver().set_read_only(read_only).await {
            let before: Vec<&Rc<Node>> = nodes.take(told).collect();
            for node in before.into_iter().rev() {
                node.driver().set_read_only(!read_only).await?;
            }
            return Err(error);
        }
    }
    Ok(())
}

fn set_read_only(nodes: &[Rc<Node>], read_only: bool) {
    for node in nodes {
        let mut options = node.options();
        options.read_only = read_only;
        node.set_options(options);
    }
}

//! Putting filters above nodes in use, and taking them out again.

use std::rc::Rc;

use crate::error::{Error, Result};

use super::graph::reaches;
use super::{Child, Driver, Graph, Node, NodeSpec, Permissions, Role};

impl Graph {
    /// Puts a filter above a node: whoever used the node uses the filter now, but for the edges by which
    /// jobs hold on to nodes. `children` are the filter's: first the one that it is put above, by which
    /// `driver` gets them. Who is below the filter itself (a target that has the node as its backing file)
    /// stays a user of the node. The filter stays as long as it has users; without any, whoever puts it in must
    /// attach to it at once.
    ///
    /// # Errors
    /// The name is taken or permissions are in the way; nothing has changed.
    pub async fn splice_in(
        &self,
        spec: NodeSpec,
        children: &[(Role, &Rc<Node>)],
        driver: impl FnOnce(&[Rc<Child>]) -> Box<dyn Driver>,
    ) -> Result<Rc<Node>> {
        let Some((_, node)) = children.first() else {
            unreachable!("a filter has a child");
        };
        let mut edges = Vec::new();
        for (role, child) in children {
            match self.attach_for(&spec.name, *role, child, Permissions::NONE) {
                Ok(edge) => edges.push(edge),
                Err(error) => return Err(self.undo(edges, error).await),
            }
        }
        let filter = match self.insert(spec, driver(&edges), edges.clone()) {
            Ok(filter) => filter,
            Err(error) => return Err(self.undo(edges, error).await),
        };
        let moved = match self.drain(std::slice::from_ref(*node)).await {
            Ok(drained) => {
                let mut users = followers(node);
                users.retain(|user| {
                    let parent = user.parent_node();
                    !parent.is_some_and(|parent| reaches(&filter, &parent))
                });
                self.redirect(&drained, &users, &filter)
            }
            Err(error) => Err(error),
        };
        match moved {
            Ok(()) => Ok(filter),
            Err(error) => {
                self.release(&filter).await?;
                Err(error)
            }
        }
    }

    /// Gives edges of a filter that was not put in back; answers what went wrong first.
    async fn undo(&self, edges: Vec<Rc<Child>>, error: Error) -> Error {
        for edge in &edges {
            if let Err(error) = self.detach(edge).await {
                tracing::error!(%error, "an image was not closed cleanly");
            }
        }
        error
    }

    /// Takes a filter out: its users use what is below it. Edges by which jobs hold on to the filter stay;
    /// it goes with the last of them.
    ///
    /// # Errors
    /// Permissions are in the way: the filter stays.
    pub async fn splice_out(&self, filter: &Rc<Node>) -> Result<()> {
        let children = filter.children();
        let child = children
            .iter()
            .find(|edge| matches!(edge.role(), Role::File | Role::Backing));
        let Some(below) = child.map(|edge| edge.node()) else {
            unreachable!("{filter:?} filters nothing");
        };
        let drained = self.drain(std::slice::from_ref(filter)).await?;
        self.redirect(&drained, &followers(filter), &below)?;
        drop(drained);
        self.release(filter).await
    }
}

/// The users of a node that go along when another takes its place.
fn followers(node: &Node) -> Vec<Rc<Child>> {
    let mut users = node.parents();
    users.retain(|edge| edge.follows());
    users
}

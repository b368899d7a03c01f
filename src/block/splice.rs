//! Putting filters above nodes in use, and taking them out again.

use std::rc::Rc;

use crate::error::{Error, Result};

use super::graph::reaches;
use super::{Child, DrainedSection, Driver, Graph, Node, NodeSpec, Permissions, Role};

impl Graph {
    /// Makes a filter and puts it above a node ([`Graph::make_filter`], [`Graph::put_in`]) in a drained
    /// section of its own.
    ///
    /// # Errors
    /// The name is taken or permissions are in the way; nothing has changed.
    pub async fn splice_in(
        &self,
        spec: NodeSpec,
        children: &[(Role, &Rc<Node>)],
        driver: impl FnOnce(&[Rc<Child>]) -> Box<dyn Driver>,
    ) -> Result<Rc<Node>> {
        let filter = self.make_filter(spec, children, driver).await?;
        let put = match self.drain(&[below(&filter)]).await {
            Ok(drained) => self.put_in(&drained, &filter),
            Err(error) => Err(error),
        };
        match put {
            Ok(()) => Ok(filter),
            Err(error) => {
                self.release(&filter).await?;
                Err(error)
            }
        }
    }

    /// Makes a filter that has no users yet. `children` are the filter's: first the one that it is to be
    /// put above, by which `driver` gets them. Whoever makes it puts it in or releases it.
    ///
    /// # Errors
    /// The name is taken or permissions are in the way; nothing has changed.
    pub async fn make_filter(
        &self,
        spec: NodeSpec,
        children: &[(Role, &Rc<Node>)],
        driver: impl FnOnce(&[Rc<Child>]) -> Box<dyn Driver>,
    ) -> Result<Rc<Node>> {
        let mut edges = Vec::new();
        for (role, child) in children {
            match self.attach_for(&spec.name, *role, child, Permissions::NONE) {
                Ok(edge) => edges.push(edge),
                Err(error) => return Err(self.undo(edges, error).await),
            }
        }
        match self.insert(spec, driver(&edges), edges.clone()) {
            Ok(filter) => Ok(filter),
            Err(error) => Err(self.undo(edges, error).await),
        }
    }

    /// Puts a filter above the node below it: whoever used the node uses the filter now, but for the edges
    /// by which jobs hold on to nodes. Who is below the filter itself (a target that has the node as its
    /// backing file) stays a user of the node. The filter stays as long as it has users; without any, whoever
    /// puts it in must attach to it at once.
    ///
    /// # Errors
    /// Permissions are in the way; nothing has changed.
    pub fn put_in(&self, drained: &DrainedSection, filter: &Rc<Node>) -> Result<()> {
        let mut users = followers(&below(filter));
        users.retain(|user| {
            let parent = user.parent_node();
            !parent.is_some_and(|parent| reaches(filter, &parent))
        });
        self.redirect(drained, &users, filter)
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

    /// Takes a filter out: its users use what is below it. Edges by which jobs hold on to the filter stay.
    ///
    /// # Errors
    /// Permissions are in the way: the filter stays.
    pub fn take_out(&self, drained: &DrainedSection, filter: &Rc<Node>) -> Result<()> {
        self.redirect(drained, &followers(filter), &below(filter))
    }

    /// Takes a filter out in a drained section of its own; it goes with the last edge by which a job holds
    /// on to it.
    ///
    /// # Errors
    /// As [`Graph::take_out`].
    pub async fn splice_out(&self, filter: &Rc<Node>) -> Result<()> {
        let drained = self.drain(std::slice::from_ref(filter)).await?;
        self.take_out(&drained, filter)?;
        drop(drained);
        self.release(filter).await
    }
}

/// What a filter filters.
fn below(filter: &Node) -> Rc<Node> {
    let children = filter.children();
    let child = children
        .iter()
        .find(|edge| matches!(edge.role(), Role::File | Role::Backing));
    match child {
        Some(edge) => edge.node(),
        None => unreachable!("{filter:?} filters nothing"),
    }
}

/// The users of a node that go along when another takes its place.
fn followers(node: &Node) -> Vec<Rc<Child>> {
    let mut users = node.parents();
    users.retain(|edge| edge.follows());
    users
}

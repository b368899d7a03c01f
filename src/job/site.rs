//! What a job changes of the graph to do its work, taken back at its end.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Job, JobKind, Workshop};
use crate::block::{
    Child, Content, Driver, Node, NodeSpec, Occupation, Parent, Permission, Permissions, Role,
    TruncateOptions,
};
use crate::error::{Error, Result};

/// Who sets a node's size.
const RESIZER: Permissions = Permissions {
    required: Permission::RESIZE,
    shared: Permission::all(),
};

/// The filter, the edges, the marks and the write access that a job has taken. Each is taken in a step
/// that may fail; [`Site::restore`] gives back what was taken so far.
pub(super) struct Site {
    workshop: Workshop,
    kind: JobKind,
    id: String,
    description: String,
    filter: RefCell<Option<Rc<Node>>>,
    edges: RefCell<Vec<Rc<Child>>>,
    occupied: RefCell<Vec<Occupation>>,
    /// Nodes that were read-only before.
    opened: RefCell<Vec<Rc<Node>>>,
    /// A node that was made longer, and its size before, until the job begins.
    grown: RefCell<Option<(Rc<Node>, u64)>>,
}

impl Site {
    /// Nothing is taken yet.
    pub(super) fn new(workshop: &Workshop, kind: JobKind, id: &str) -> Site {
        Site {
            workshop: workshop.clone(),
            kind,
            id: id.to_owned(),
            description: format!("{} job '{id}'", kind.name()),
            filter: RefCell::default(),
            edges: RefCell::default(),
            occupied: RefCell::default(),
            opened: RefCell::default(),
            grown: RefCell::default(),
        }
    }

    /// Turns a node read-write if it is not.
    ///
    /// # Errors
    /// The image or its file cannot be written.
    pub(super) async fn open_for_writing(&self, node: &Rc<Node>) -> Result<()> {
        if !node.options().read_only {
            return Ok(());
        }
        let drained = self
            .workshop
            .graph
            .drain(std::slice::from_ref(node))
            .await?;
        self.workshop.images.make_writable(node).await?;
        drop(drained);
        self.opened.borrow_mut().push(node.clone());
        Ok(())
    }

    /// The node stays read-write when the job has ended.
    pub(super) fn leave_writable(&self, node: &Rc<Node>) {
        let mut opened = self.opened.borrow_mut();
        opened.retain(|other| !Rc::ptr_eq(other, node));
    }

    /// Makes a node longer. It is as short as it was again where the set-up fails: nobody has seen it since.
    ///
    /// # Errors
    /// What the driver says; permissions are in the way.
    pub(super) async fn grow(&self, node: &Rc<Node>, size: u64) -> Result<()> {
        let before = node.size();
        self.resize(node, size).await?;
        *self.grown.borrow_mut() = Some((node.clone(), before));
        Ok(())
    }

    async fn resize(&self, node: &Rc<Node>, size: u64) -> Result<()> {
        let edge = self.reach(node, RESIZER)?;
        let options = TruncateOptions {
            exact: false,
            zero_new: true,
        };
        let resized = edge.truncate(size, options).await;
        self.leave(&edge).await;
        resized
    }

    /// Ends a job's set-up. It went well: what was made longer stays so, however the job ends. It did not:
    /// everything is given back, and the job goes.
    ///
    /// # Errors
    /// That of the set-up.
    pub(super) async fn begin<T>(&self, job: &Rc<Job>, set_up: Result<T>) -> Result<T> {
        if set_up.is_ok() {
            self.grown.take();
        } else {
            self.restore().await;
            self.workshop.jobs.give_up(job);
        }
        set_up
    }

    /// Puts the job's filter above a node, the first of `children`; without a name it is one that users
    /// are not shown.
    ///
    /// # Errors
    /// The name is malformed or taken; permissions are in the way.
    pub(super) async fn put_filter(
        &self,
        name: Option<&str>,
        children: &[(Role, &Rc<Node>)],
        driver: impl FnOnce(&[Rc<Child>]) -> Box<dyn Driver>,
    ) -> Result<Rc<Node>> {
        let spec = self.filter_spec(name, children)?;
        let filter = self
            .workshop
            .graph
            .splice_in(spec, children, driver)
            .await?;
        Ok(self.own_filter(filter))
    }

    /// As [`Site::put_filter`], but nobody uses the filter yet: `Graph::put_in` puts it in.
    ///
    /// # Errors
    /// As [`Site::put_filter`].
    pub(super) async fn make_filter(
        &self,
        name: Option<&str>,
        children: &[(Role, &Rc<Node>)],
        driver: impl FnOnce(&[Rc<Child>]) -> Box<dyn Driver>,
    ) -> Result<Rc<Node>> {
        let spec = self.filter_spec(name, children)?;
        let filter = self
            .workshop
            .graph
            .make_filter(spec, children, driver)
            .await?;
        Ok(self.own_filter(filter))
    }

    fn filter_spec(&self, name: Option<&str>, children: &[(Role, &Rc<Node>)]) -> Result<NodeSpec> {
        let Workshop {
            graph,
            images,
            jobs,
        } = &self.workshop;
        if let Some(name) = name {
            images.check_node_name(name)?;
        }
        let Some((_, node)) = children.first() else {
            unreachable!("a filter has a child");
        };
        let generated = || graph.generate_name(jobs.handle().random_u64());
        Ok(NodeSpec {
            name: name.map_or_else(generated, str::to_owned),
            options: node.options(),
            file_name: node.file_name(),
            implicit: name.is_none(),
        })
    }

    fn own_filter(&self, filter: Rc<Node>) -> Rc<Node> {
        self.occupy(&filter, Content::Stays);
        *self.filter.borrow_mut() = Some(filter.clone());
        filter
    }

    fn occupy(&self, node: &Rc<Node>, content: Content) {
        let kind = self.kind.name();
        let reason = format!("block device is in use by block job: {kind}");
        self.occupied
            .borrow_mut()
            .push(node.occupy(reason, content));
    }

    /// Keeps other jobs and changes off a node; `permissions` is what others must leave alone. A node that
    /// is copied to, and one whose content is a mixture, gets no new readers.
    ///
    /// # Errors
    /// Another user's permissions are in the way.
    pub(super) fn hold(
        &self,
        role: Role,
        node: &Rc<Node>,
        permissions: Permissions,
    ) -> Result<Rc<Child>> {
        let parent = Parent::Job {
            id: self.id.clone(),
            description: self.description.clone(),
        };
        let edge = self
            .workshop
            .graph
            .attach(role, parent, node, permissions)?;
        self.edges.borrow_mut().push(edge.clone());
        let is_mixed = !permissions.shared.contains(Permission::CONSISTENT_READ);
        let content = match role {
            // Fleecing by readers of a backup's target is as old as backups.
            Role::Target if self.kind == JobKind::Backup => Content::Stays,
            Role::Base | Role::Target => Content::Changes,
            _ if is_mixed => Content::Changes,
            _ => Content::Stays,
        };
        self.occupy(node, content);
        Ok(edge)
    }

    /// An edge for the job's own I/O.
    ///
    /// # Errors
    /// As [`Site::hold`].
    pub(super) fn reach(&self, node: &Rc<Node>, permissions: Permissions) -> Result<Rc<Child>> {
        let user = "an unnamed block device";
        let edge = self.workshop.graph.attach_root(user, node, permissions)?;
        self.edges.borrow_mut().push(edge.clone());
        Ok(edge)
    }

    /// Gives back an edge from [`Site::reach`].
    pub(super) async fn leave(&self, edge: &Rc<Child>) {
        self.edges
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, edge));
        self.note(self.workshop.graph.detach(edge).await);
    }

    /// Gives everything back. What fails is logged: there is nobody left to tell.
    pub(super) async fn restore(&self) {
        self.occupied.take();
        let filter = self.filter.take();
        // What the job does and what others must leave alone is in the way of the users that come back.
        self.detach_all(|edge| {
            !filter
                .as_ref()
                .is_some_and(|own| Rc::ptr_eq(&edge.node(), own))
        })
        .await;
        // With the last user of the device the whole chain goes.
        if let Some(filter) = filter.as_ref().filter(|own| self.is_open(own)) {
            self.note(self.workshop.graph.splice_out(filter).await);
        }
        self.detach_all(|_| true).await;
        let grown = self.grown.take();
        if let Some((node, size)) = grown {
            self.note(self.resize(&node, size).await);
        }
        for node in self.opened.take() {
            self.note(self.close_for_writing(&node).await);
        }
        if let Some(filter) = filter {
            // Without users nobody else would notice.
            self.note(self.workshop.graph.release(&filter).await);
        }
    }

    async fn detach_all(&self, which: impl Fn(&Child) -> bool) {
        while let Some(edge) = self.take_newest(&which) {
            self.note(self.workshop.graph.detach(&edge).await);
        }
    }

    fn take_newest(&self, which: impl Fn(&Child) -> bool) -> Option<Rc<Child>> {
        let mut edges = self.edges.borrow_mut();
        let index = edges.iter().rposition(|edge| which(edge))?;
        Some(edges.remove(index))
    }

    async fn close_for_writing(&self, node: &Rc<Node>) -> Result<()> {
        let graph = &self.workshop.graph;
        if !self.is_open(node) {
            return Ok(());
        }
        let _drained = graph.drain(std::slice::from_ref(node)).await?;
        self.workshop.images.make_read_only(node).await
    }

    fn is_open(&self, node: &Rc<Node>) -> bool {
        let open = self.workshop.graph.find(node.name());
        open.is_some_and(|open| Rc::ptr_eq(&open, node))
    }

    fn note(&self, result: Result<(), Error>) {
        if let Err(error) = result {
            tracing::error!(job = self.description, %error, "the graph could not be put back in order");
        }
    }
}

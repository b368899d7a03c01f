//! The graph: which nodes there are, and every change of their edges.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::permission_update::PermissionUpdate;
use super::{
    Child, DrainedSection, Driver, Node, NodeOptions, Parent, Permission, Permissions, Role,
};

/// Something in the graph that its users want to know.
#[derive(Clone, Debug)]
pub enum BlockEvent {
    /// Metadata of an image turned out to be wrong.
    ImageCorrupted {
        /// The node.
        node_name: String,
        /// What is wrong.
        message: String,
        /// Where, in the image file.
        offset: Option<u64>,
        /// How many bytes.
        size: Option<u64>,
        /// The image is not usable any more.
        fatal: bool,
    },
    /// A request from outside was answered with an error.
    RequestFailed {
        /// Who asked: the id of an export.
        user: String,
        /// The node that was asked.
        node_name: String,
        /// It was to change something.
        writes: bool,
        /// What it was answered with.
        errno: Errno,
    },
}

/// What a new node is besides its driver.
pub struct NodeSpec {
    /// Node-name; from [`Graph::generate_name`] where the user gave none.
    pub name: String,
    /// Options that every node has.
    pub options: NodeOptions,
    /// File name as queries show it.
    pub file_name: String,
    /// Put in by a job without a name: file names and `query-block` look through it.
    pub implicit: bool,
}

/// All nodes of one I/O thread. Cheap to clone: a handle.
#[derive(Clone, Default)]
pub struct Graph {
    inner: Rc<Inner>,
}

type EventSink = Box<dyn Fn(BlockEvent)>;

#[derive(Default)]
struct Inner {
    nodes: RefCell<Vec<Rc<Node>>>,
    generated: Cell<u32>,
    edges: Cell<u64>,
    sinks: RefCell<Vec<EventSink>>,
}

impl Graph {
    /// No nodes.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// All nodes, newest first.
    pub fn nodes(&self) -> Vec<Rc<Node>> {
        self.inner.nodes.borrow().iter().rev().cloned().collect()
    }

    /// The node with this name.
    pub fn find(&self, name: &str) -> Option<Rc<Node>> {
        self.inner
            .nodes
            .borrow()
            .iter()
            .find(|node| node.name() == name)
            .cloned()
    }

    /// A name for a node that the user did not name: `#block`, a counter, two more digits.
    pub fn generate_name(&self, random: u64) -> String {
        let number = self.inner.generated.get();
        self.inner.generated.set(number + 1);
        format!("#block{number}{:02}", random % 100)
    }

    /// Calls `sink` for each event from now on.
    pub fn on_event(&self, sink: impl Fn(BlockEvent) + 'static) {
        self.inner.sinks.borrow_mut().push(Box::new(sink));
    }

    /// Tells everybody.
    pub fn emit(&self, event: BlockEvent) {
        for sink in &*self.inner.sinks.borrow() {
            sink(event.clone());
        }
    }

    /// A new edge to `node`; its permissions hold, down to locks on files, when this returns.
    ///
    /// # Errors
    /// Another user's permissions are in the way; nothing has changed.
    pub fn attach(
        &self,
        role: Role,
        parent: Parent,
        node: &Rc<Node>,
        permissions: Permissions,
    ) -> Result<Rc<Child>> {
        let serial = self.inner.edges.get();
        self.inner.edges.set(serial + 1);
        let edge = Rc::new(Child::new(role, parent, node.clone(), permissions, serial));
        node.add_parent(&edge);
        match PermissionUpdate::prepare(std::slice::from_ref(node)) {
            Ok(update) => {
                update.commit();
                Ok(edge)
            }
            Err(error) => {
                node.remove_parent(&edge);
                Err(error)
            }
        }
    }

    /// A new edge from a user of the graph.
    ///
    /// # Errors
    /// As [`Graph::attach`].
    pub fn attach_root(
        &self,
        description: impl Into<String>,
        node: &Rc<Node>,
        permissions: Permissions,
    ) -> Result<Rc<Child>> {
        let parent = Parent::Root {
            description: description.into(),
        };
        self.attach(Role::Root, parent, node, permissions)
    }

    /// A new edge for a node of this name that is being opened.
    ///
    /// # Errors
    /// As [`Graph::attach`].
    pub fn attach_for(
        &self,
        parent_name: &str,
        role: Role,
        node: &Rc<Node>,
        permissions: Permissions,
    ) -> Result<Rc<Child>> {
        let parent = Parent::Node {
            name: parent_name.to_owned(),
            node: Weak::new(),
        };
        self.attach(role, parent, node, permissions)
    }

    /// Puts an opened driver into the graph; `children` are the edges that it was opened with.
    ///
    /// # Errors
    /// The name is taken, or permissions are in the way. The caller detaches the children.
    pub fn insert(
        &self,
        spec: NodeSpec,
        driver: Box<dyn Driver>,
        children: Vec<Rc<Child>>,
    ) -> Result<Rc<Node>> {
        if self.find(&spec.name).is_some() {
            let message = format!("Duplicate nodes with node-name='{}'", spec.name);
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let node = Rc::new(Node::new(spec, driver));
        for child in &children {
            child.set_parent_node(&node);
        }
        *node.children.borrow_mut() = children;
        PermissionUpdate::prepare(std::slice::from_ref(&node))?.commit();
        self.inner.nodes.borrow_mut().push(node.clone());
        Ok(node)
    }

    /// Takes an edge away. A node below that nobody uses or owns any more is closed, and so on down.
    ///
    /// # Errors
    /// What closing a node says; the graph has changed all the same.
    pub fn detach<'a>(
        &'a self,
        edge: &'a Rc<Child>,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
        Box::pin(async move {
            let node = edge.node();
            // Apart: a chain is closed one future in another, a thousand deep.
            Box::pin(self.tell_writers_gone(&node, edge)).await;
            unlink(edge, &node);
            self.release(&node).await
        })
    }

    /// Tells a node below `edge` that its last writer goes, while its own edges still have what they had.
    async fn tell_writers_gone(&self, node: &Rc<Node>, edge: &Rc<Child>) {
        let writes = |edge: &Rc<Child>| {
            let required = edge.permissions().required;
            required.contains(Permission::WRITE)
        };
        let others = node.parents();
        let stay = others
            .iter()
            .any(|other| !Rc::ptr_eq(other, edge) && writes(other));
        if !writes(edge) || stay {
            return;
        }
        if let Err(error) = node.driver().writers_gone().await {
            tracing::warn!(node = node.name(), %error, "after the last writer");
        }
    }

    /// Closes the node if nobody uses or owns it, and detaches what is below.
    ///
    /// # Errors
    /// The first that closing says; everything is closed all the same.
    pub async fn release(&self, node: &Rc<Node>) -> Result<()> {
        if node.is_monitor_owned() || !node.parents().is_empty() {
            return Ok(());
        }
        if !self.forget(node) {
            return Ok(());
        }
        let mut result = node.driver().close().await;
        for child in node.children() {
            let below = self.detach(&child).await;
            result = result.and(below);
        }
        result
    }

    /// Removes the node from the list; false if it was not there.
    fn forget(&self, node: &Rc<Node>) -> bool {
        let mut nodes = self.inner.nodes.borrow_mut();
        let before = nodes.len();
        nodes.retain(|other| !Rc::ptr_eq(other, node));
        nodes.len() < before
    }

    /// Lets these edges lead to `new` instead of where they lead. In a drained section.
    ///
    /// # Errors
    /// Permissions are in the way, or a cycle would arise; nothing has changed.
    pub fn redirect(
        &self,
        _drained: &DrainedSection,
        edges: &[Rc<Child>],
        new: &Rc<Node>,
    ) -> Result<()> {
        let old: Vec<Rc<Node>> = edges.iter().map(|edge| edge.node()).collect();
        for edge in edges {
            if edge
                .parent_node()
                .is_some_and(|parent| reaches(new, &parent))
            {
                return Err(cycle(edge, new));
            }
        }
        for edge in edges {
            move_edge(edge, new);
        }
        let mut affected = old.clone();
        affected.push(new.clone());
        match PermissionUpdate::prepare(&affected) {
            Ok(update) => {
                update.commit();
                Ok(())
            }
            Err(error) => {
                for (edge, node) in edges.iter().zip(&old) {
                    move_edge(edge, node);
                }
                Err(error)
            }
        }
    }

    /// Gives `parent` a backing edge to `backing`, or takes it away; the driver is told. The old
    /// backing node is not released: the caller does that outside the drained section.
    ///
    /// # Errors
    /// Permissions are in the way, a cycle would arise, or the driver has no backing file; nothing
    /// has changed.
    pub fn set_backing(
        &self,
        drained: &DrainedSection,
        parent: &Rc<Node>,
        backing: Option<&Rc<Node>>,
    ) -> Result<()> {
        match (parent.child(Role::Backing), backing) {
            (Some(edge), Some(backing)) => self.redirect(drained, &[edge], backing),
            (Some(edge), None) => {
                let node = edge.node();
                parent.driver().set_backing(None)?;
                remove_edge(&parent.children, &edge);
                node.remove_parent(&edge);
                PermissionUpdate::prepare(&[node]).map(PermissionUpdate::commit)
            }
            (None, Some(backing)) => {
                if reaches(backing, parent) {
                    let message = format!(
                        "Making '{}' a backing child of '{}' would create a cycle",
                        backing.name(),
                        parent.name()
                    );
                    return Err(Error::new(ErrorKind::InvalidArgument, message));
                }
                self.add_backing(parent, backing)
            }
            (None, None) => Ok(()),
        }
    }

    fn add_backing(&self, parent: &Rc<Node>, backing: &Rc<Node>) -> Result<()> {
        let writable = !parent.options().read_only;
        let wanted = parent
            .driver()
            .child_permissions(Role::Backing, parent.users(), writable);
        let edge = self.attach_for(parent.name(), Role::Backing, backing, wanted)?;
        if let Err(error) = parent.driver().set_backing(Some(edge.clone())) {
            backing.remove_parent(&edge);
            PermissionUpdate::prepare(std::slice::from_ref(backing))?.commit();
            return Err(error);
        }
        edge.set_parent_node(parent);
        parent.children.borrow_mut().push(edge);
        Ok(())
    }

    /// Options of a node have changed: checks and applies what follows for permissions and locks.
    ///
    /// # Errors
    /// Permissions are in the way; they are as before, the caller puts the options back.
    pub fn refresh_permissions(&self, nodes: &[Rc<Node>]) -> Result<()> {
        PermissionUpdate::prepare(nodes).map(PermissionUpdate::commit)
    }

    /// Holds requests to these nodes back, and waits for those in flight.
    ///
    /// # Errors
    /// A driver could not stop what it does by itself; nothing is held.
    pub async fn drain(&self, nodes: &[Rc<Node>]) -> Result<DrainedSection> {
        DrainedSection::begin(nodes).await
    }
}

/// Takes an edge out of both its ends. Not inlined: it would be in each frame of a chain that is closed.
#[inline(never)]
fn unlink(edge: &Rc<Child>, node: &Rc<Node>) {
    node.remove_parent(edge);
    if let Some(parent) = edge.parent_node() {
        remove_edge(&parent.children, edge);
    }
    match PermissionUpdate::prepare(std::slice::from_ref(node)) {
        Ok(update) => update.commit(),
        Err(error) => {
            tracing::warn!(node = node.name(), %error, "permissions could not be given back");
        }
    }
}

/// `to` is `from` or somewhere below it.
pub(super) fn reaches(from: &Rc<Node>, to: &Rc<Node>) -> bool {
    Rc::ptr_eq(from, to) || from.children().iter().any(|edge| reaches(&edge.node(), to))
}

fn cycle(edge: &Rc<Child>, new: &Rc<Node>) -> Error {
    let parent = edge.parent_node();
    let message = format!(
        "Making '{}' a {} child of '{}' would create a cycle",
        new.name(),
        edge.role().name(),
        parent.as_ref().map_or("", |parent| parent.name())
    );
    Error::new(ErrorKind::InvalidArgument, message)
}

fn move_edge(edge: &Rc<Child>, node: &Rc<Node>) {
    edge.node().remove_parent(edge);
    edge.set_node(node.clone());
    node.add_parent(edge);
}

fn remove_edge(edges: &RefCell<Vec<Rc<Child>>>, edge: &Rc<Child>) {
    edges.borrow_mut().retain(|other| !Rc::ptr_eq(other, edge));
}

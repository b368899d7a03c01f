//! What jobs ask of whoever opened the nodes.

use std::rc::Rc;

use super::{Jobs, LocalFuture};
use crate::block::{Graph, Node};
use crate::error::Result;

/// Access to image files, and their names: only who opened the nodes knows about these.
pub trait Images {
    /// The name may be given to a new node.
    ///
    /// # Errors
    /// Malformed or taken, in QEMU's words.
    fn check_node_name(&self, name: &str) -> Result<()>;

    /// Turns a read-only node read-write, with the files that were opened for it. In a drained section.
    fn make_writable<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>>;

    /// Turns a node read-only, with the files that were opened for it. In a drained section.
    fn make_read_only<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>>;

    /// What an overlay's header gets as the name of this node.
    fn name_for_header(&self, node: &Node) -> String;

    /// The node's header names a backing file, but none is attached.
    fn lacks_backing(&self, node: &Rc<Node>) -> bool;

    /// The node's header names what is attached as its backing file now.
    fn backing_changed(&self, node: &Node);
}

/// What every job works with.
#[derive(Clone)]
pub struct Workshop {
    /// The nodes.
    pub graph: Graph,
    /// The jobs.
    pub jobs: Jobs,
    /// Access and names.
    pub images: Rc<dyn Images>,
}

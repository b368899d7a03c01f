//! What jobs ask of whoever opened the nodes, answered by `blockdev`.

use std::rc::Rc;

use crate::block::Node;
use crate::blockdev::Blockdev;
use crate::error::Result;
use crate::job::{Images, LocalFuture};

/// `blockdev` for jobs.
pub(super) struct OpenImages(pub(super) Blockdev);

impl Images for OpenImages {
    fn check_node_name(&self, name: &str) -> Result<()> {
        self.0.check_new_name(name)
    }

    fn make_writable<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.0.make_writable(node))
    }

    fn make_read_only<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.0.make_read_only(node))
    }

    fn name_for_header(&self, node: &Node) -> String {
        self.0.name_for_header(node)
    }

    fn lacks_backing(&self, node: &Rc<Node>) -> bool {
        self.0.lacks_backing(node)
    }

    fn backing_changed(&self, node: &Node) {
        self.0.backing_changed(node);
    }
}

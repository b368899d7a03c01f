//! Options to graph: the only code that opens anything by name.
//!
//! [`Blockdev`] opens trees of nodes as they are described, takes them apart again, reopens them with
//! other options, and puts overlays on top. It also answers what nodes there are. It knows no JSON:
//! a description comes as a tree of [`Value`]s and results are typed.
//!
//! Not here: the format of a declared image is never guessed. A backing file without declared format
//! is taken as raw, and refused where its first bytes look like an image of some format: read as raw
//! it would be garbage, and what a raw disk contains must not decide how it is read.
//!
//! Invariants:
//! - Calls that change the graph are made one at a time (the control socket sees to that).
//! - A call that fails leaves the graph as it was, and no file that was not there before.
//! - What an image's header names is opened read-only, and only files and devices.

mod access;
mod backing_name;
mod bitmap_change;
mod bitmaps;
mod blkdebug_description;
mod chain;
mod create;
mod description;
mod effective;
mod file_name;
mod filter_description;
mod image_info;
mod internal_snapshot;
mod job_target;
mod names;
mod nbd_description;
mod open;
mod origin;
mod query;
mod reopen;
mod reopen_children;
mod resize;
mod snapshot;
mod snapshot_file;
mod state_file;
mod value;

use std::cell::RefCell;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;

use crate::block::{Graph, Node, NodeOptions, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{ThrottleGroup, ThrottleGroups, ThrottleLimits};
use crate::runtime::Handle;

use effective::Source;

pub use bitmap_change::{BitmapAction, BitmapChange, BitmapName};
pub use bitmaps::NewBitmap;
pub use chain::{chain_contains, find_in_chain};
pub use description::{
    BackingDescription, ChildDescription, Description, DriverOptions, FileDescription,
    NullDescription, Qcow2Description, SharedOptions,
};
pub use filter_description::{FilterDescription, FilterOptions};
pub use image_info::{FormatSpecific, ImageInfo, image_info};
pub use internal_snapshot::NewInternalSnapshot;
pub use job_target::{JobTarget, NewTarget, TargetBelow};
pub use names::{check_not_busy, find_device_or_node, find_either, find_listed, find_node};
pub use nbd_description::NbdDescription;
pub use query::{DirtyBitmapInfo, NodeInfo, StatisticsInfo};
pub use snapshot::{Snapshot, SnapshotMode, SnapshotSync};
pub use value::Value;

/// A future on the graph's thread.
type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Opens, changes and shows the nodes of one graph. Cheap to clone: a handle.
#[derive(Clone)]
pub struct Blockdev {
    handle: Handle,
    graph: Graph,
    throttle_groups: ThrottleGroups,
    /// Where is kept what images cannot hold.
    state_directory: Rc<RefCell<Option<PathBuf>>>,
}

impl Blockdev {
    /// For the nodes of `graph`, which `handle`'s thread owns.
    pub fn new(handle: &Handle, graph: &Graph) -> Blockdev {
        Blockdev {
            handle: handle.clone(),
            graph: graph.clone(),
            throttle_groups: ThrottleGroups::default(),
            state_directory: Rc::default(),
        }
    }

    /// Where bitmaps of raw images that are opened from now on are kept; the directory is made when it is needed.
    /// `None`: they are not.
    pub fn set_state_directory(&self, directory: Option<PathBuf>) {
        *self.state_directory.borrow_mut() = directory;
    }

    /// A new group for throttle nodes; its id is not taken, its limits go together.
    pub fn add_throttle_group(&self, id: &str, limits: ThrottleLimits) {
        let group = ThrottleGroup::new(&self.handle, id, limits);
        self.throttle_groups.add(group);
    }

    /// The groups that throttle nodes can be in.
    pub fn throttle_groups(&self) -> &ThrottleGroups {
        &self.throttle_groups
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// `blockdev-add`: opens a tree of nodes; the root is owned by the monitor.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open.
    pub async fn add(&self, description: Value) -> Result<Rc<Node>> {
        let description = Description::parse(description)?;
        if description.node_name.is_none() {
            return Err(value::invalid(
                "'node-name' must be specified for the root node",
            ));
        }
        self.open_owned(description).await
    }

    async fn open_owned(&self, description: Description) -> Result<Rc<Node>> {
        let node = self.open(description, Source::Defaults).await?;
        node.set_monitor_owned(true);
        Ok(node)
    }

    /// Opens an image for reading, by the name of a file, a device or an NBD server's export, with the backing
    /// files that it names; the root is owned by the monitor.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open.
    pub async fn add_read_only(
        &self,
        node_name: &str,
        filename: &str,
        format: &str,
    ) -> Result<Rc<Node>> {
        let like = NodeOptions {
            read_only: true,
            ..NodeOptions::default()
        };
        let backing = BackingDescription::FromHeader;
        let mut image = self
            .image_description(&like, filename, format, backing)
            .await?;
        image.node_name = Some(node_name.to_owned());
        self.open_owned(image).await
    }

    /// `blockdev-del`: closes a node that was added and is not used.
    ///
    /// # Errors
    /// It is used, or not the monitor's; or what closing says, then it is gone all the same.
    pub async fn delete(&self, node_name: &str) -> Result<()> {
        let node = names::find_listed(&self.graph, node_name)?;
        let in_use = |message| Err(Error::new(ErrorKind::InUse, message));
        let parents = node.parents();
        if parents.iter().any(|edge| edge.role() == Role::Root) {
            return in_use(format!("Node {node_name} is in use"));
        }
        check_not_busy(&node)?;
        if !node.is_monitor_owned() {
            return in_use(format!("Node {node_name} is not owned by the monitor"));
        }
        if !parents.is_empty() {
            return in_use(format!("Block device {node_name} is in use"));
        }
        self.release_owned(&node).await
    }

    /// Closes every node that nobody uses, at the end of the program.
    ///
    /// # Errors
    /// The first that closing says; everything is closed all the same.
    pub async fn close_all(&self) -> Result<()> {
        let mut result = Ok(());
        for node in self.graph.nodes() {
            if node.is_monitor_owned() {
                let closed = self.release_owned(&node).await;
                result = result.and(closed);
            }
        }
        result
    }

    /// The name may be given to a new node.
    ///
    /// # Errors
    /// Malformed or taken.
    pub fn check_new_name(&self, name: &str) -> Result<()> {
        names::check_new(&self.graph, name)
    }

    /// What an overlay's header gets as the name of this node.
    pub fn name_for_header(&self, node: &Node) -> String {
        file_name::for_header(node)
    }

    /// A node's header names a backing file, but none is attached.
    pub fn lacks_backing(&self, node: &Rc<Node>) -> bool {
        let image = node.without_filters();
        chain::header_reference(&image).is_some() && image.child(Role::Backing).is_none()
    }

    /// A node's header names what is attached as its backing file now.
    pub fn backing_changed(&self, node: &Node) {
        chain::note_automatic(node);
        file_name::refresh(node);
    }

    async fn release_owned(&self, node: &Rc<Node>) -> Result<()> {
        node.set_monitor_owned(false);
        let result = self.graph.release(node).await;
        file_name::refresh_all(&self.graph);
        result
    }
}

#[cfg(test)]
mod change_tests;
#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod tests;

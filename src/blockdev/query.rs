//! What nodes there are: `query-named-block-nodes` and `query-blockstats`.

use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags, Node, NodeOptions, NodeStatistics, Role};
use crate::error::Result;
use crate::filter::MirrorTop;
use crate::protocol::file::{DiscardStatistics, File};

use super::image_info::{ImageInfo, Show, flat_info, image_below};
use super::{Blockdev, names};

/// A node, in the shape of QEMU's `BlockDeviceInfo`.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// Node-name.
    pub node_name: String,
    /// Driver.
    pub driver: &'static str,
    /// File name, plain or `json:`.
    pub file: String,
    /// Options as they are now: `ro`, `cache`, `detect_zeroes`.
    pub options: NodeOptions,
    /// File name of the attached backing node; a filter has none.
    pub backing_file: Option<String>,
    /// Backing and filtered nodes below; 0 in a flat answer.
    pub backing_file_depth: u64,
    /// Its bitmaps, and what jobs remember of it, newest first.
    pub dirty_bitmaps: Vec<DirtyBitmapInfo>,
    /// The image behind it.
    pub image: ImageInfo,
}

/// A dirty bitmap.
#[derive(Clone, Debug)]
pub struct DirtyBitmapInfo {
    /// Its name; one that a job has for itself has none.
    pub name: Option<String>,
    /// The states that hold.
    pub flags: BitmapFlags,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Bytes that are dirty.
    pub count: u64,
}

/// Counters of a node, and of the node that it keeps its data in.
#[derive(Clone, Debug)]
pub struct StatisticsInfo {
    /// Node-name.
    pub node_name: String,
    /// Driver.
    pub driver: &'static str,
    /// Requests that entered the node. QEMU counts only [`NodeStatistics::highest_written`] per node.
    pub counters: NodeStatistics,
    /// Of `file` and `host_device`.
    pub discards: Option<DiscardStatistics>,
    /// The `file` child's.
    pub parent: Option<Box<StatisticsInfo>>,
}

impl Blockdev {
    /// All nodes, newest first. `flat`: without the images below each.
    pub fn query_named_block_nodes(&self, flat: bool) -> Vec<NodeInfo> {
        let nodes = self.graph.nodes();
        let show = if flat { Show::Flat } else { Show::All };
        nodes.iter().map(|node| node_info(node, show)).collect()
    }

    /// What a user of this node has before him, with the images below it: filters that jobs put in
    /// without a name are looked through.
    ///
    /// # Errors
    /// There is no such node.
    pub fn query_node(&self, node_name: &str) -> Result<NodeInfo> {
        let node = names::find_node(&self.graph, node_name)?;
        let known = node.without_implicit_filters();
        Ok(node_info(&known, Show::Known))
    }

    /// Counters of all nodes, oldest first.
    pub fn query_statistics(&self) -> Vec<StatisticsInfo> {
        let nodes = self.graph.nodes();
        nodes.iter().rev().map(|node| statistics(node)).collect()
    }
}

fn node_info(node: &Rc<Node>, show: Show) -> NodeInfo {
    let image = match show {
        Show::Flat => flat_info(node),
        _ => image_below(node, show),
    };
    let backing = node.child(Role::Backing);
    let backing = backing.filter(|_| !node.driver().is_filter());
    NodeInfo {
        node_name: node.name().to_owned(),
        driver: node.driver().driver_name(),
        file: node.file_name(),
        options: node.options(),
        backing_file: backing.map(|edge| edge.node().file_name()),
        backing_file_depth: depth_of(&image),
        dirty_bitmaps: dirty_bitmaps(node),
        image,
    }
}

fn dirty_bitmaps(node: &Node) -> Vec<DirtyBitmapInfo> {
    let bitmaps = node.bitmaps().all();
    let own = bitmaps.iter().rev().flat_map(|bitmap| of_user(bitmap));
    node.driver_as()
        .map(of_mirror)
        .into_iter()
        .chain(own)
        .collect()
}

/// While it is frozen, what records beside it is shown before it.
fn of_user(bitmap: &Bitmap) -> impl Iterator<Item = DirtyBitmapInfo> {
    let granularity = bitmap.granularity();
    let beside = bitmap.dirty_since_frozen().map(|count| DirtyBitmapInfo {
        name: None,
        flags: bitmap.flags() & BitmapFlags::ENABLED,
        granularity,
        count,
    });
    let named = DirtyBitmapInfo {
        name: Some(bitmap.name().to_owned()),
        flags: bitmap.flags(),
        granularity,
        count: bitmap.dirty_bytes(),
    };
    beside.into_iter().chain([named])
}

/// Records nothing but what the job is told.
fn of_mirror(mirror: &MirrorTop) -> DirtyBitmapInfo {
    DirtyBitmapInfo {
        name: None,
        flags: BitmapFlags::empty(),
        granularity: mirror.granularity(),
        count: mirror.dirty_bytes(),
    }
}

fn depth_of(image: &ImageInfo) -> u64 {
    let layers = std::iter::successors(image.backing_image.as_deref(), |image| {
        image.backing_image.as_deref()
    });
    layers.count() as u64
}

fn statistics(node: &Node) -> StatisticsInfo {
    let below = node.storage();
    StatisticsInfo {
        node_name: node.name().to_owned(),
        driver: node.driver().driver_name(),
        counters: node.statistics(),
        discards: node.driver_as::<File>().map(File::discards),
        parent: below.map(|edge| Box::new(statistics(&edge.node()))),
    }
}

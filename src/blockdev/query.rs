//! What nodes there are: `query-named-block-nodes` and `query-blockstats`.

use std::rc::Rc;

use crate::block::{Node, NodeOptions, NodeStatistics, Role};
use crate::error::Result;
use crate::protocol::file::{DiscardStatistics, File};

use super::image_info::{ImageInfo, flat_info, image_info};
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
    /// File name of the attached backing node.
    pub backing_file: Option<String>,
    /// Backing nodes below; 0 in a flat answer.
    pub backing_file_depth: u64,
    /// The image behind it.
    pub image: ImageInfo,
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
        nodes.iter().map(|node| node_info(node, flat)).collect()
    }

    /// One node with the images below it.
    ///
    /// # Errors
    /// There is no such node.
    pub fn query_node(&self, node_name: &str) -> Result<NodeInfo> {
        let node = names::find_node(&self.graph, node_name)?;
        Ok(node_info(&node, false))
    }

    /// Counters of all nodes, oldest first.
    pub fn query_statistics(&self) -> Vec<StatisticsInfo> {
        let nodes = self.graph.nodes();
        nodes.iter().rev().map(|node| statistics(node)).collect()
    }
}

fn node_info(node: &Rc<Node>, flat: bool) -> NodeInfo {
    let image = if flat {
        flat_info(node)
    } else {
        image_info(node)
    };
    NodeInfo {
        node_name: node.name().to_owned(),
        driver: node.driver().driver_name(),
        file: node.file_name(),
        options: node.options(),
        backing_file: node.backing().map(|backing| backing.file_name()),
        backing_file_depth: if flat { 0 } else { depth_of(node) },
        image,
    }
}

fn depth_of(node: &Rc<Node>) -> u64 {
    let mut depth = 0;
    let mut next = node.backing();
    while let Some(backing) = next {
        depth += 1;
        next = backing.backing();
    }
    depth
}

fn statistics(node: &Node) -> StatisticsInfo {
    let below = node.child(Role::File);
    StatisticsInfo {
        node_name: node.name().to_owned(),
        driver: node.driver().driver_name(),
        counters: node.statistics(),
        discards: node.driver_as::<File>().map(File::discards),
        parent: below.map(|edge| Box::new(statistics(&edge.node()))),
    }
}

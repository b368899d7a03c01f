//! What is known of an image, in the shape of QEMU's `ImageInfo`.

use std::rc::Rc;

use crate::block::{Node, Role};
use crate::format::qcow2::{Qcow2, Qcow2Info};
use crate::protocol::file::File;

use super::backing_name::{combine, file_below};

/// An image and what lies below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// File name, plain or `json:`.
    pub filename: String,
    /// Driver.
    pub format: &'static str,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes that the image takes up, where that is known.
    pub actual_size: Option<u64>,
    /// Bytes in a cluster, where the format has clusters.
    pub cluster_size: Option<u64>,
    /// Not closed cleanly.
    pub dirty_flag: bool,
    /// The header's backing file name.
    pub backing_filename: Option<String>,
    /// The same, relative to the image's own directory.
    pub full_backing_filename: Option<String>,
    /// The header's backing format.
    pub backing_filename_format: Option<String>,
    /// What only this format has.
    pub format_specific: Option<FormatSpecific>,
    /// The attached backing node's image.
    pub backing_image: Option<Box<ImageInfo>>,
    /// Other children by role.
    pub children: Vec<(&'static str, ImageInfo)>,
}

/// What only one format has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatSpecific {
    /// Of `file` and `host_device`: nothing.
    File,
    /// Of `qcow2`.
    Qcow2(Qcow2Info),
}

/// How much of the graph an answer shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    /// The node alone.
    Flat,
    /// All below it.
    All,
    /// All below it but for filters that jobs put in without a name.
    Known,
}

/// The image behind a node, with everything below.
pub fn image_info(node: &Rc<Node>) -> ImageInfo {
    image_below(node, Show::All)
}

/// As [`image_info`]. A filter's child stands where the backing image of others does, as in QEMU.
pub(super) fn image_below(node: &Rc<Node>, show: Show) -> ImageInfo {
    let mut info = flat_info(node);
    let below = node.filtered().or_else(|| node.child(Role::Backing));
    info.backing_image = below.map(|edge| {
        let next = match show {
            Show::Known => edge.node().without_implicit_filters(),
            _ => edge.node(),
        };
        Box::new(image_below(&next, show))
    });
    info.children = node
        .children()
        .iter()
        .filter(|edge| edge.role() != Role::Backing)
        .map(|edge| (edge.role().name(), image_info(&edge.node())))
        .collect();
    info
}

/// The image behind a node, without what is below.
pub(super) fn flat_info(node: &Node) -> ImageInfo {
    let qcow2 = node.driver_as::<Qcow2>().map(Qcow2::info);
    let filtered = node.filtered().map(|edge| edge.node().without_filters());
    let filtered = filtered.and_then(|node| Some(node.driver_as::<Qcow2>()?.info()));
    let shown = qcow2.as_ref().or(filtered.as_ref());
    let is_file = node.driver_as::<File>().is_some();
    let backing = qcow2.as_ref().and_then(|info| info.backing.clone());
    let (backing_filename, backing_filename_format) = match backing {
        Some(reference) => (Some(reference.file), reference.format),
        None => (None, None),
    };
    ImageInfo {
        filename: node.file_name(),
        format: node.driver().driver_name(),
        virtual_size: node.size(),
        actual_size: allocated_bytes(node),
        cluster_size: shown.map(|info| info.cluster_size),
        dirty_flag: shown.is_some_and(|info| info.dirty),
        full_backing_filename: backing_filename.as_ref().map(|name| combine(node, name)),
        backing_filename,
        backing_filename_format,
        format_specific: match qcow2 {
            Some(info) => Some(FormatSpecific::Qcow2(info)),
            None => is_file.then_some(FormatSpecific::File),
        },
        backing_image: None,
        children: Vec::new(),
    }
}

/// Bytes of the file at the bottom of the `file` children.
fn allocated_bytes(node: &Node) -> Option<u64> {
    if let Some(file) = node.driver_as::<File>() {
        return file.allocated_bytes().ok();
    }
    file_below(node)?
        .driver_as::<File>()?
        .allocated_bytes()
        .ok()
}

//! `query-named-block-nodes` and `query-block`.

use std::path::Path;
use std::rc::Rc;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::block::{DetectZeroes, Node, Role};
use crate::export::ExportType;
use crate::format::qcow2::header::CompressionType;
use crate::format::qcow2::{Qcow2, Qcow2Info};
use crate::protocol::file::File;
use crate::qmp::schema::Args;

/// How much of a backing chain a description holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// The node alone.
    Flat,
    /// All images below it.
    Chain,
}

/// `query-named-block-nodes`: newest node first.
pub(super) fn query_nodes(context: &Context, args: Args<'_>) -> Outcome {
    let depth = match args.bool("flat") {
        Some(true) => Depth::Flat,
        _ => Depth::Chain,
    };
    let nodes = context.graph.nodes();
    Ok(nodes.iter().map(|node| device_info(node, depth)).collect())
}

/// `query-block`: what is a device to somebody, which the ublk exports are.
pub(super) fn query_devices(context: &Context) -> Outcome {
    let exports = context.exports.list();
    let devices = exports
        .iter()
        .rev()
        .map(|status| &status.export)
        .filter(|export| export.export_type() == ExportType::Ublk);
    Ok(devices
        .map(|export| {
            json!({
                "device": "",
                "qdev": export.id(),
                "type": "unknown",
                "removable": false,
                "locked": false,
                "inserted": device_info(&export.root().node(), Depth::Chain),
            })
        })
        .collect())
}

fn device_info(node: &Rc<Node>, depth: Depth) -> Value {
    let options = node.options();
    let mut info = json!({
        "node-name": node.name(),
        "drv": node.driver().driver_name(),
        "file": node.file_name(),
        "ro": options.read_only,
        "active": true,
        "encrypted": false,
        "backing_file_depth": if depth == Depth::Flat { 0 } else { backing_depth(node) },
        "detect_zeroes": match options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
        "cache": {
            "writeback": true,
            "direct": options.cache_direct,
            "no-flush": options.cache_no_flush,
        },
        "bps": 0,
        "bps_rd": 0,
        "bps_wr": 0,
        "iops": 0,
        "iops_rd": 0,
        "iops_wr": 0,
        "write_threshold": 0,
        "image": image_info(node, depth),
    });
    if let Some(backing) = node.backing() {
        info["backing_file"] = backing.file_name().into();
    }
    info
}

fn backing_depth(node: &Rc<Node>) -> usize {
    std::iter::successors(node.backing(), |node| node.backing()).count()
}

fn image_info(node: &Rc<Node>, depth: Depth) -> Value {
    let mut info = json!({
        "filename": node.file_name(),
        "format": node.driver().driver_name(),
        "virtual-size": node.size(),
        "dirty-flag": false,
    });
    if let Some(bytes) = allocated_bytes(node) {
        info["actual-size"] = bytes.into();
    }
    if node.driver_as::<File>().is_some() {
        info["format-specific"] = json!({"type": "file", "data": {}});
    }
    if let Some(image) = node.driver_as::<Qcow2>() {
        add_qcow2(&mut info, node, &image.info());
    }
    if let (Depth::Chain, Some(backing)) = (depth, node.backing()) {
        info["backing-image"] = image_info(&backing, depth);
    }
    info
}

/// Bytes that the file at the bottom takes on its file system.
fn allocated_bytes(node: &Rc<Node>) -> Option<u64> {
    match (node.driver_as::<File>(), node.child(Role::File)) {
        (Some(file), _) => file.allocated_bytes().ok(),
        (None, Some(child)) => allocated_bytes(&child.node()),
        (None, None) => None,
    }
}

fn add_qcow2(info: &mut Value, node: &Rc<Node>, image: &Qcow2Info) {
    info["cluster-size"] = image.cluster_size.into();
    info["dirty-flag"] = image.dirty.into();
    let mut data = json!({
        "compat": image.compat,
        "refcount-bits": image.refcount_bits,
        "compression-type": match image.compression_type {
            CompressionType::Deflate => "zlib",
            CompressionType::Zstd => "zstd",
        },
    });
    if image.compat != "0.10" {
        data["lazy-refcounts"] = image.lazy_refcounts.into();
        data["corrupt"] = image.corrupt.into();
        data["extended-l2"] = image.extended_l2.into();
    }
    info["format-specific"] = json!({"type": "qcow2", "data": data});
    if let Some(backing) = &image.backing {
        info["backing-filename"] = backing.file.as_str().into();
        let full = resolve_backing(&protocol_file_name(node), &backing.file);
        info["full-backing-filename"] = full.into();
        if let Some(format) = &backing.format {
            info["backing-filename-format"] = format.as_str().into();
        }
    }
}

/// The name of the file that the image is in.
fn protocol_file_name(node: &Rc<Node>) -> String {
    match node.child(Role::File) {
        Some(child) => protocol_file_name(&child.node()),
        None => node.file_name(),
    }
}

/// What a name in a header means: relative to the image's directory, as written otherwise.
fn resolve_backing(image: &str, name: &str) -> String {
    let directory = image.rfind('/').map_or("", |slash| &image[..=slash]);
    match Path::new(name).is_absolute() || has_protocol(name) {
        true => name.to_owned(),
        false => format!("{directory}{name}"),
    }
}

fn has_protocol(name: &str) -> bool {
    name.find([':', '/'])
        .is_some_and(|at| name[at..].starts_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_are_relative_to_the_image() {
        assert_eq!(resolve_backing("b.qcow2", "./a.qcow2"), "./a.qcow2");
        assert_eq!(resolve_backing("sub/b.qcow2", "./a.qcow2"), "sub/./a.qcow2");
        assert_eq!(resolve_backing("/x/b", "/y/a"), "/y/a");
        assert_eq!(resolve_backing("/x/b", "json:{}"), "json:{}");
        assert_eq!(resolve_backing("/x/b", "y/a:b"), "/x/y/a:b");
    }
}

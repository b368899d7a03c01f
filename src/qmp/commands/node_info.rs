//! `query-named-block-nodes` and `query-block`, in QEMU's JSON.

use serde_json::{Value, json};

use super::snapshot::snapshot_info;
use super::{Context, Outcome};
use crate::block::{BitmapFlags, DetectZeroes};
use crate::blockdev::{DirtyBitmapInfo, FormatSpecific, ImageInfo, NodeInfo};
use crate::export::ExportType;
use crate::format::qcow2::header::CompressionType;
use crate::format::qcow2::{BitmapInfo, Qcow2Info};
use crate::qmp::schema::Args;

/// `query-named-block-nodes`: newest node first.
pub(super) fn query_nodes(context: &Context, args: Args<'_>) -> Outcome {
    let flat = args.bool("flat").unwrap_or(false);
    let nodes = context.blockdev.query_named_block_nodes(flat);
    Ok(nodes.iter().map(device_info).collect())
}

/// `query-block`: what is a device to somebody, which the ublk exports are.
pub(super) fn query_devices(context: &Context) -> Outcome {
    let mut devices = Vec::new();
    for status in context.exports.list().iter().rev() {
        let export = &status.export;
        if export.export_type() == ExportType::Ublk {
            let node = context.blockdev.query_node(export.root().node().name())?;
            devices.push(json!({
                "device": "",
                "qdev": export.id(),
                "type": "unknown",
                "removable": false,
                "locked": false,
                "inserted": device_info(&node),
            }));
        }
    }
    Ok(devices.into())
}

fn device_info(node: &NodeInfo) -> Value {
    let options = &node.options;
    let mut info = json!({
        "node-name": node.node_name,
        "drv": node.driver,
        "file": node.file,
        "ro": options.read_only,
        "active": true,
        "encrypted": false,
        "backing_file_depth": node.backing_file_depth,
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
        "image": image_info(&node.image),
    });
    set(&mut info, "backing_file", node.backing_file.as_deref());
    let bitmaps: Vec<Value> = node.dirty_bitmaps.iter().map(dirty_bitmap).collect();
    set(
        &mut info,
        "dirty-bitmaps",
        Some(bitmaps).filter(|bitmaps| !bitmaps.is_empty()),
    );
    info
}

fn dirty_bitmap(bitmap: &DirtyBitmapInfo) -> Value {
    let is = |flag| bitmap.flags.contains(flag);
    let mut info = json!({
        "count": bitmap.count,
        "granularity": bitmap.granularity,
        "recording": is(BitmapFlags::ENABLED),
        "busy": is(BitmapFlags::BUSY),
        "persistent": is(BitmapFlags::PERSISTENT),
    });
    set(&mut info, "name", bitmap.name.as_deref());
    let inconsistent = is(BitmapFlags::INCONSISTENT);
    set(&mut info, "inconsistent", inconsistent.then_some(true));
    info
}

/// `ImageInfo`, as qemu-img shows it, too.
pub fn image_info(image: &ImageInfo) -> Value {
    let mut info = json!({
        "filename": image.filename,
        "format": image.format,
        "virtual-size": image.virtual_size,
        "dirty-flag": image.dirty_flag,
    });
    set(&mut info, "actual-size", image.actual_size);
    set(&mut info, "cluster-size", image.cluster_size);
    let text = |text: &Option<String>| text.clone();
    set(&mut info, "backing-filename", text(&image.backing_filename));
    set(
        &mut info,
        "full-backing-filename",
        text(&image.full_backing_filename),
    );
    set(
        &mut info,
        "backing-filename-format",
        text(&image.backing_filename_format),
    );
    if let Some(FormatSpecific::Qcow2(qcow2)) = &image.format_specific
        && !qcow2.snapshots.is_empty()
    {
        info["snapshots"] = qcow2.snapshots.iter().map(snapshot_info).collect();
    }
    set(
        &mut info,
        "format-specific",
        image.format_specific.as_ref().map(format_specific),
    );
    set(
        &mut info,
        "backing-image",
        image.backing_image.as_deref().map(image_info),
    );
    info
}

fn format_specific(specific: &FormatSpecific) -> Value {
    match specific {
        FormatSpecific::File => json!({"type": "file", "data": {}}),
        FormatSpecific::Qcow2(image) => json!({"type": "qcow2", "data": qcow2_info(image)}),
    }
}

fn qcow2_info(image: &Qcow2Info) -> Value {
    let mut info = json!({
        "compat": image.compat,
        "refcount-bits": image.refcount_bits,
        "compression-type": match image.compression_type {
            CompressionType::Deflate => "zlib",
            CompressionType::Zstd => "zstd",
        },
    });
    if image.compat != "0.10" {
        info["lazy-refcounts"] = image.lazy_refcounts.into();
        info["corrupt"] = image.corrupt.into();
        info["extended-l2"] = image.extended_l2.into();
    }
    if !image.bitmaps.is_empty() {
        info["bitmaps"] = image.bitmaps.iter().map(stored_bitmap).collect();
    }
    info
}

fn stored_bitmap(bitmap: &BitmapInfo) -> Value {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
    let set: Vec<&str> = flags
        .iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| *name)
        .collect();
    json!({"name": bitmap.name, "granularity": bitmap.granularity, "flags": set})
}

fn set(object: &mut Value, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        object[name] = value.into();
    }
}

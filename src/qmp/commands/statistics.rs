//! `query-blockstats`.
//!
//! As in QEMU, a node tells where its last written byte lies and what its driver counted; operations
//! are counted for devices, which are the ublk exports.

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::block::NodeStatistics;
use crate::blockdev::StatisticsInfo;
use crate::export::ExportType;
use crate::qmp::schema::Args;

pub(super) fn query(context: &Context, args: Args<'_>) -> Outcome {
    let nodes = context.blockdev.query_statistics();
    if args.bool("query-nodes") == Some(true) {
        return Ok(nodes.iter().map(node_stats).collect());
    }
    let mut devices = Vec::new();
    for status in context.exports.list().iter().rev() {
        let export = &status.export;
        let root = export.root().node();
        let node = nodes.iter().find(|node| node.node_name == root.name());
        if let (ExportType::Ublk, Some(node)) = (export.export_type(), node) {
            let mut stats = node_stats(node);
            stats["device"] = "".into();
            stats["qdev"] = export.id().into();
            stats["stats"] = counters(&node.counters);
            devices.push(stats);
        }
    }
    Ok(devices.into())
}

fn node_stats(node: &StatisticsInfo) -> Value {
    let only_end = NodeStatistics {
        highest_written: node.counters.highest_written,
        ..NodeStatistics::default()
    };
    let mut stats = json!({"node-name": node.node_name, "stats": counters(&only_end)});
    if let Some(discards) = &node.discards {
        stats["driver-specific"] = json!({
            "driver": node.driver,
            "discard-nb-ok": discards.succeeded,
            "discard-nb-failed": discards.failed,
            "discard-bytes-ok": discards.bytes,
        });
    }
    if let Some(below) = &node.parent {
        stats["parent"] = node_stats(below);
    }
    stats
}

/// All members that QEMU has; what is not counted here is 0.
fn counters(statistics: &NodeStatistics) -> Value {
    json!({
        "rd_bytes": statistics.read_bytes,
        "wr_bytes": statistics.written_bytes,
        "zone_append_bytes": 0,
        "unmap_bytes": 0,
        "rd_operations": statistics.reads,
        "wr_operations": statistics.writes,
        "zone_append_operations": 0,
        "flush_operations": statistics.flushes,
        "unmap_operations": 0,
        "rd_total_time_ns": 0,
        "wr_total_time_ns": 0,
        "zone_append_total_time_ns": 0,
        "flush_total_time_ns": 0,
        "unmap_total_time_ns": 0,
        "wr_highest_offset": statistics.highest_written,
        "rd_merged": 0,
        "wr_merged": 0,
        "zone_append_merged": 0,
        "unmap_merged": 0,
        "failed_rd_operations": 0,
        "failed_wr_operations": 0,
        "failed_zone_append_operations": 0,
        "failed_flush_operations": 0,
        "failed_unmap_operations": 0,
        "invalid_rd_operations": 0,
        "invalid_wr_operations": 0,
        "invalid_zone_append_operations": 0,
        "invalid_flush_operations": 0,
        "invalid_unmap_operations": 0,
        "account_invalid": false,
        "account_failed": false,
        "timed_stats": [],
    })
}

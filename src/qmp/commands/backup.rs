//! `blockdev-backup`: what its arguments mean, in QEMU's checking order.

use std::rc::Rc;
use std::time::Duration;

use serde_json::json;

use super::{Context, Outcome, job};
use crate::block::Node;
use crate::blockdev::find_either;
use crate::error::{Error, Result};
use crate::filter::{CbwOptions, OnCbwError};
use crate::job::{Backup, BackupPerformance, BackupSync, ErrorPolicies, backup};
use crate::qmp::schema::Args;

/// `blockdev-backup`.
pub(super) async fn start(context: &Context, args: Args<'_>) -> Outcome {
    let source = find_either(&context.graph, args.required_str("device"))?;
    let target = find_either(&context.graph, args.required_str("target"))?;
    let arguments = arguments(args, source, target)?;
    backup(&context.workshop, arguments).await?;
    Ok(json!({}))
}

fn arguments(args: Args<'_>, source: Rc<Node>, target: Rc<Node>) -> Result<Backup> {
    let sync = sync(args)?;
    if Rc::ptr_eq(&source, &target) {
        return Err(Error::refused("Source and target cannot be the same"));
    }
    let compress = args.bool("compress").unwrap_or(false);
    if compress && !target.without_filters().driver().compresses() {
        // QEMU says the name of the drive here, which a node has not.
        return Err(Error::refused(
            "Compression is not supported for this drive ",
        ));
    }
    source.check_unoccupied()?;
    target.check_unoccupied()?;
    let perf = args.object("x-perf");
    let min_cluster_size = min_cluster_size(perf)?;
    Ok(Backup {
        job: job::options(args),
        source,
        target,
        sync,
        on_error: ErrorPolicies {
            on_source_error: job::policy(args, "on-source-error"),
            on_target_error: job::policy(args, "on-target-error"),
        },
        saving: CbwOptions {
            on_error: on_cbw_error(args),
            timeout: args.u64("cbw-timeout").map(Duration::from_secs),
            min_cluster_size,
        },
        compress,
        discard_source: args.bool("discard-source").unwrap_or(false),
        performance: performance(perf)?,
        filter_node_name: job::text(args, "filter-node-name"),
    })
}

/// There are no bitmaps yet: what QEMU says where a node has none.
fn sync(args: Args<'_>) -> Result<BackupSync> {
    let sync = args.required_str("sync");
    if let Some(name) = args.str("bitmap") {
        if sync == "incremental"
            && args
                .str("bitmap-mode")
                .is_some_and(|mode| mode != "on-success")
        {
            return Err(Error::refused(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            ));
        }
        return Err(Error::refused(format!(
            "Bitmap '{name}' could not be found"
        )));
    }
    if matches!(sync, "incremental" | "bitmap") {
        return Err(Error::refused(format!(
            "must provide a valid bitmap name for '{sync}' sync mode"
        )));
    }
    if args.str("bitmap-mode").is_some() {
        return Err(Error::refused(
            "Cannot specify bitmap sync mode without a bitmap",
        ));
    }
    Ok(match sync {
        "top" => BackupSync::Top,
        "none" => BackupSync::Nothing,
        _ => BackupSync::Full,
    })
}

fn on_cbw_error(args: Args<'_>) -> OnCbwError {
    match args.str("on-cbw-error") {
        Some("break-snapshot") => OnCbwError::BreakSnapshot,
        _ => OnCbwError::BreakGuestWrite,
    }
}

fn performance(perf: Option<Args<'_>>) -> Result<BackupPerformance> {
    let mut performance = BackupPerformance::default();
    let Some(perf) = perf else {
        return Ok(performance);
    };
    if let Some(use_copy_range) = perf.bool("use-copy-range") {
        performance.use_copy_range = use_copy_range;
    }
    if let Some(workers) = perf.i64("max-workers") {
        if !(1..=i64::from(i32::MAX)).contains(&workers) {
            let text = format!("max-workers must be between 1 and {}", i32::MAX);
            return Err(Error::refused(text));
        }
        performance.max_workers = workers as usize;
    }
    if let Some(chunk) = perf.i64("max-chunk") {
        let text = "max-chunk must be zero (which means no limit) or positive";
        performance.max_chunk = u64::try_from(chunk).map_err(|_| Error::refused(text))?;
    }
    Ok(performance)
}

/// A negative number is a huge one, as in QEMU.
fn min_cluster_size(perf: Option<Args<'_>>) -> Result<u64> {
    let size = perf.and_then(|perf| perf.i64("min-cluster-size"));
    let size = size.unwrap_or(0) as u64;
    if size > i64::MAX as u64 {
        let text = format!("min-cluster-size too large: {size} > {}", i64::MAX);
        return Err(Error::refused(text));
    }
    Ok(size)
}

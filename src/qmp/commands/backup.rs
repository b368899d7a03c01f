//! `blockdev-backup` and `drive-backup`: what their arguments mean, in QEMU's checking order.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use serde_json::json;

use super::mirror::{attached_below, target_mode};
use super::{Context, Outcome, job};
use crate::block::{Action, DrainedSection, IoFuture, Node};
use crate::blockdev::{Blockdev, JobTarget, NewTarget, SnapshotMode, TargetBelow, find_either};
use crate::error::{Error, Result};
use crate::filter::{CbwOptions, OnCbwError};
use crate::job::{
    Backup, BackupBitmap, BackupPerformance, BackupSync, BitmapMode, ErrorPolicies, JobGroup,
    PreparedBackup,
};
use crate::qmp::schema::Args;

/// What a backup is part of.
#[derive(Clone, Copy)]
pub(super) enum Company<'a> {
    /// Nothing: it is a command.
    Alone,
    /// A transaction, whose actions before it may yet make the bitmap.
    Transaction(Option<&'a Rc<JobGroup>>),
}

/// `blockdev-backup`.
pub(super) async fn start(context: &Context, args: Args<'_>) -> Outcome {
    run(context, prepare(context, args, Company::Alone).await?).await
}

/// `drive-backup`.
pub(super) async fn drive(context: &Context, args: Args<'_>) -> Outcome {
    run(context, prepare_drive(context, args, Company::Alone).await?).await
}

async fn run(context: &Context, prepared: impl Action + 'static) -> Outcome {
    let action: Box<dyn Action> = Box::new(prepared);
    context.graph.transact(&[action]).await?;
    Ok(json!({}))
}

/// `blockdev-backup`, ready for its moment.
pub(super) async fn prepare(
    context: &Context,
    args: Args<'_>,
    company: Company<'_>,
) -> Result<PreparedBackup> {
    let source = find_either(&context.graph, args.required_str("device"))?;
    let target = find_either(&context.graph, args.required_str("target"))?;
    let arguments = arguments(args, source, target, company)?;
    prepare_job(context, arguments, company).await
}

async fn prepare_job(
    context: &Context,
    arguments: Backup,
    company: Company<'_>,
) -> Result<PreparedBackup> {
    let group = match company {
        Company::Transaction(group) => group,
        Company::Alone => None,
    };
    PreparedBackup::prepare(&context.workshop, arguments, group).await
}

/// `drive-backup`, ready for its moment: the target is open.
pub(super) async fn prepare_drive(
    context: &Context,
    args: Args<'_>,
    company: Company<'_>,
) -> Result<DriveBackup> {
    let source = find_either(&context.graph, args.required_str("device"))?;
    source.check_unoccupied()?;
    let mode = target_mode(args);
    let below = match args.required_str("sync") {
        "top" => attached_below(&source),
        "none" => Some(source.clone()),
        _ => None,
    };
    let wanted = NewTarget {
        source: &source,
        filename: args.required_str("target"),
        format: args.str("format"),
        mode,
        node_name: None,
        backing: below
            .as_ref()
            .filter(|_| mode == SnapshotMode::AbsolutePaths),
        below: match &below {
            Some(node) => TargetBelow::Node(node),
            None => TargetBelow::Nothing,
        },
        stays_small: true,
    };
    let target = context.blockdev.open_job_target(wanted).await?;
    let prepared = match arguments(args, source, target.node.clone(), company) {
        Ok(arguments) => prepare_job(context, arguments, company).await,
        Err(error) => Err(error),
    };
    match prepared {
        Ok(backup) => Ok(DriveBackup {
            blockdev: context.blockdev.clone(),
            backup,
            target: RefCell::new(Some(target)),
        }),
        Err(error) => {
            context.blockdev.settle_job_target(target, true).await?;
            Err(error)
        }
    }
}

/// A backup whose target was opened for it.
pub(super) struct DriveBackup {
    blockdev: Blockdev,
    backup: PreparedBackup,
    target: RefCell<Option<JobTarget>>,
}

impl Action for DriveBackup {
    fn nodes(&self) -> Vec<Rc<Node>> {
        self.backup.nodes()
    }

    fn make<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        self.backup.make(drained)
    }

    fn undo<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        self.backup.undo(drained)
    }

    fn settle(&self, made: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.backup.settle(made).await?;
            let target = self.target.take();
            match target {
                // From now on it is the job's.
                Some(target) => self.blockdev.settle_job_target(target, !made).await,
                None => Ok(()),
            }
        })
    }
}

fn arguments(
    args: Args<'_>,
    source: Rc<Node>,
    target: Rc<Node>,
    company: Company<'_>,
) -> Result<Backup> {
    let (sync, bitmap) = selection(args, &source, company)?;
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
        bitmap,
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

/// Which parts are copied, and the bitmap that says so or follows.
fn selection(
    args: Args<'_>,
    source: &Rc<Node>,
    company: Company<'_>,
) -> Result<(BackupSync, Option<BackupBitmap>)> {
    let name = args.required_str("sync");
    let sync = match name {
        "top" => BackupSync::Top,
        "none" => BackupSync::Nothing,
        "full" => BackupSync::Full,
        _ => BackupSync::Bitmap,
    };
    let Some(bitmap) = args.str("bitmap") else {
        if sync == BackupSync::Bitmap {
            return Err(Error::refused(format!(
                "must provide a valid bitmap name for '{name}' sync mode"
            )));
        }
        if args.str("bitmap-mode").is_some() {
            return Err(Error::refused(
                "Cannot specify bitmap sync mode without a bitmap",
            ));
        }
        return Ok((sync, None));
    };
    let mode = bitmap_mode(args, name)?;
    let Some(mode) = mode else {
        known(bitmap, source, BitmapMode::Never, company)?;
        return Err(Error::refused(
            "Bitmap sync mode must be given when providing a bitmap",
        ));
    };
    let bitmap = known(bitmap, source, mode, company)?;
    if sync == BackupSync::Nothing {
        return Err(Error::refused(
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ));
    }
    if sync != BackupSync::Bitmap && mode == BitmapMode::Never {
        return Err(Error::refused(format!(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{name}'"
        )));
    }
    Ok((sync, Some(bitmap)))
}

fn bitmap_mode(args: Args<'_>, sync: &str) -> Result<Option<BitmapMode>> {
    let given = args.str("bitmap-mode").map(|mode| match mode {
        "on-success" => BitmapMode::OnSuccess,
        "never" => BitmapMode::Never,
        _ => BitmapMode::Always,
    });
    if sync != "incremental" {
        return Ok(given);
    }
    match given.unwrap_or(BitmapMode::OnSuccess) {
        BitmapMode::OnSuccess => Ok(Some(BitmapMode::OnSuccess)),
        _ => Err(Error::refused(
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        )),
    }
}

/// The bitmap, looked for at once unless it may still be made.
fn known(
    name: &str,
    source: &Node,
    mode: BitmapMode,
    company: Company<'_>,
) -> Result<BackupBitmap> {
    let bitmap = BackupBitmap {
        name: name.to_owned(),
        mode,
    };
    if matches!(company, Company::Alone) {
        bitmap.find(source)?;
    }
    Ok(bitmap)
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

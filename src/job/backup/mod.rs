//! `backup`: copies what a node holds at the start of the job to a target, while its guest goes on.
//!
//! A copy-before-write filter above the node saves what a guest is about to change; the job copies the
//! rest, each part held by the filter meanwhile. A backup that has not come to its end is none: what the
//! target holds counts when the job has flushed it. The guest's data is nowhere but in the node, however
//! the job ends.
//!
//! Its moment is a transaction's ([`PreparedBackup`]): a bitmap is frozen, and the filter put in, while
//! nothing is in flight.

mod start;
mod tracking;
mod work;

use std::rc::Rc;

use super::{ErrorPolicies, Job, JobOptions, Workshop};
use crate::block::{Action, Node};
use crate::error::Result;
use crate::filter::CbwOptions;

pub use start::PreparedBackup;
pub use tracking::{BackupBitmap, BitmapMode};

/// Which parts a backup copies by itself. What a guest is about to change it always does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// All.
    Full,
    /// What the node itself has; the target has the node's backing file below.
    Top,
    /// What is dirty in the bitmap.
    Bitmap,
    /// None: until it is cancelled, the target has what has changed, with the node itself below.
    Nothing,
}

/// How a backup goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupPerformance {
    /// Parts of files may be copied inside the kernel.
    pub use_copy_range: bool,
    /// Most pieces in flight.
    pub max_workers: usize,
    /// Most bytes in a piece; 0 is no limit.
    pub max_chunk: u64,
}

impl Default for BackupPerformance {
    fn default() -> BackupPerformance {
        BackupPerformance {
            use_copy_range: true,
            max_workers: 64,
            max_chunk: 0,
        }
    }
}

/// Arguments of a backup.
pub struct Backup {
    /// What every job has.
    pub job: JobOptions,
    /// The node whose content is copied.
    pub source: Rc<Node>,
    /// Where it goes.
    pub target: Rc<Node>,
    /// Which parts.
    pub sync: BackupSync,
    /// A bitmap of the source; given where it says what is copied.
    pub bitmap: Option<BackupBitmap>,
    /// What is done about I/O errors of the job's own copies.
    pub on_error: ErrorPolicies,
    /// What is done where a guest's change has to wait for too long, or what it replaces cannot be saved.
    pub saving: CbwOptions,
    /// Data is stored compressed; the target can.
    pub compress: bool,
    /// What has been copied is discarded in the source.
    pub discard_source: bool,
    /// How it goes about it.
    pub performance: BackupPerformance,
    /// Name of the filter; without one it is not shown to users.
    pub filter_node_name: Option<String>,
}

/// Starts a backup.
///
/// # Errors
/// In QEMU's words; nothing has changed.
pub async fn backup(workshop: &Workshop, arguments: Backup) -> Result<Rc<Job>> {
    let prepared = PreparedBackup::prepare(workshop, arguments, None).await?;
    let job = prepared.job().clone();
    let action: Box<dyn Action> = Box::new(prepared);
    workshop.graph.transact(&[action]).await?;
    Ok(job)
}

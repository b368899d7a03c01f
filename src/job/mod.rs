//! Long work on the graph: what a job is, how it runs, and the kinds of jobs.
//!
//! [`Jobs`] is all jobs of a graph. A [`Job`] is the state that its users and its work share; the
//! runner leads it through its life, and a [`Work`] says what its kind does. Guest writes meet jobs
//! only in filters, which a job puts above the nodes that it works on and takes out at its end.
//!
//! Not here: QMP's names and errors of arguments (`qmp`), opening and names of images (asked of
//! [`Images`]), formats (asked of the node).
//!
//! Invariants:
//! - The chain on disk opens to the right content at every instant: a job's copies are flushed before a
//!   header is changed, and a header is changed before the graph is.
//! - A job gives back all that it has taken (edges, filters, access), however it ends, before it is
//!   told to have concluded.
//! - No job waits inside a drained section; a job holds no lock while it waits at a gate.

mod active_commit;
mod backup;
mod chain;
mod commit;
mod control;
pub mod copy;
mod error_policy;
mod event;
mod group;
mod images;
mod jobs;
mod link;
mod mirror;
mod pieces;
mod rate_limit;
mod site;
mod status;
mod stream;
mod stretch;
mod verbs;

pub use active_commit::commit_active;
pub use backup::{
    Backup, BackupBitmap, BackupPerformance, BackupSync, BitmapMode, PreparedBackup, backup,
};
pub use chain::check_unoccupied;
pub use commit::{Commit, commit};
pub use control::{Job, JobOptions, LocalFuture, Piece, Work};
pub use error_policy::{ErrorPolicies, ErrorPolicy, IoStatus};
pub use event::{BlockJobReport, ErrorAction, JobEvent, JobKind, Operation, Progress};
pub use group::JobGroup;
pub use images::{Images, Workshop};
pub use jobs::Jobs;
pub use mirror::{Before, Mirror, SyncMode, mirror};
pub use status::{Status, Verb};
pub use stream::{Stream, stream};

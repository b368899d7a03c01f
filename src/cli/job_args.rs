//! Arguments of `liveblk stream`, `commit`, `mirror`, `jobs` and `job`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::args::{EndpointArguments, Output};
use super::format::Format;
use super::size;

/// What is done when a request of the job fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OnError {
    /// The job fails.
    Report,
    /// The job tries again (a stream leaves the part out, and fails in the end).
    Ignore,
    /// The job is paused until it is resumed.
    Stop,
    /// Paused where there is no space left, failed otherwise.
    Enospc,
}

impl OnError {
    /// The name in QMP.
    pub(super) fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Ignore => "ignore",
            OnError::Stop => "stop",
            OnError::Enospc => "enospc",
        }
    }
}

/// How a job that follows the active layer deals with what is written meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CopyMode {
    /// It is copied after it was written; to both at once where that does not keep up.
    Background,
    /// It is written to both at once.
    WriteBlocking,
}

impl CopyMode {
    /// The name in QMP.
    pub(super) fn name(self) -> &'static str {
        match self {
            CopyMode::Background => "background",
            CopyMode::WriteBlocking => "write-blocking",
        }
    }
}

/// What `stream`, `commit` and `mirror` have in common.
#[derive(Args, Debug)]
pub(super) struct ChainJobArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// Bytes a second at most: a number, or with a suffix k, M, G; no limit if not given
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub(super) speed: Option<u64>,

    /// What is done when reading or writing fails; report if not given
    #[arg(long, value_enum, value_name = "POLICY")]
    pub(super) on_error: Option<OnError>,

    /// Name of the job; stream0, commit0, mirror0 or the like if not given
    #[arg(long, value_name = "ID")]
    pub(super) job_id: Option<String>,

    /// Show the progress, and return when the job has ended
    #[arg(short, long)]
    pub(super) wait: bool,

    /// How to write the result
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,
}

/// Pull the data of backing files up into a layer, which then does without them.
///
/// All layers between TARGET and the base are copied into TARGET, while it is used; after that they are
/// not needed by it any more, and remain valid images. Without --base that is the whole chain.
///
/// The result on stdout is the job's id. Its end can be waited for with --wait or with `liveblk job
/// wait`, and until it was told there the job stays in `liveblk jobs`. Ctrl-C ends the waiting (exit
/// status 130), never the job. A job that has failed or was cancelled is exit status 1.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk stream --wait
  liveblk stream --base disk.qcow2 --speed 100M /dev/ublkb0
  liveblk stream --name vm1 --job-id s1 --base node-A node-C"
)]
pub(super) struct StreamArguments {
    #[command(flatten)]
    pub(super) job: ChainJobArguments,

    /// The layer that is filled: a device path, the id of an export, or a node-name; needed if more than
    /// one node is exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// The layer that stays below it: a node-name or a file
    #[arg(long, value_name = "LAYER")]
    pub(super) base: Option<String>,

    /// What the header that changes names as backing file, instead of the base's own name
    #[arg(long, value_name = "NAME")]
    pub(super) backing_file: Option<PathBuf>,
}

/// Push the data of overlays down into a base, and drop the overlays from the chain.
///
/// Without --top this is everything above the base, with what is written meanwhile; when both are in
/// step the base takes the active layer's place, and the command returns when that has happened. With
/// --no-complete it returns when they are in step, and `liveblk job complete` or `cancel` ends the job.
///
/// With --top a layer below the active one, that layer and those between it and the base are dropped; the
/// result on stdout is the job's id, or its end is waited for with --wait.
///
/// Ctrl-C ends the waiting (exit status 130), never the job. A job that has failed or was cancelled is
/// exit status 1.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk commit
  liveblk commit --top monday.qcow2 --base disk.qcow2 --wait
  liveblk commit --name vm1 --no-complete --copy-mode write-blocking /dev/ublkb0"
)]
pub(super) struct CommitArguments {
    #[command(flatten)]
    pub(super) job: ChainJobArguments,

    /// The chain: a device path, the id of an export, or the node-name of an active layer; needed if more
    /// than one node is exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// The highest layer that is committed: a node-name or a file; the active layer if not given
    #[arg(long, value_name = "LAYER")]
    pub(super) top: Option<String>,

    /// The layer that is committed to: a node-name or a file; the lowest one if not given
    #[arg(long, value_name = "LAYER")]
    pub(super) base: Option<String>,

    /// What the header that changes names as backing file, instead of the base's own name
    #[arg(long, value_name = "NAME")]
    pub(super) backing_file: Option<PathBuf>,

    /// Return when both are in step, and leave the active layer in its place
    #[arg(long)]
    pub(super) no_complete: bool,

    /// What happens to writes to the active layer meanwhile; background if not given
    #[arg(long, value_enum, value_name = "MODE")]
    pub(super) copy_mode: Option<CopyMode>,
}

/// How much a mirror copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Sync {
    /// All that the chain shows: the copy has no backing file.
    Full,
    /// What the active layer has: the copy gets its backing file.
    Top,
    /// Only what is written from now on: the active layer becomes the backing file of the copy.
    None,
}

impl Sync {
    /// The name in QMP.
    pub(super) fn name(self) -> &'static str {
        match self {
            Sync::Full => "full",
            Sync::Top => "top",
            Sync::None => "none",
        }
    }
}

/// Copy a chain to another image while it is used, and let the copy take its place.
///
/// The copy is made in FILE. When it is in step with what is written, it becomes the active layer, and the
/// command returns when that has happened. With --no-pivot the copy stays what the chain was at one instant
/// then, and the chain stays in use. With --no-complete the command returns when both are in step, and
/// `liveblk job complete` or `cancel` ends the job.
///
/// Ctrl-C ends the waiting (exit status 130), never the job. A job that has failed or was cancelled is
/// exit status 1.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk mirror /fast/disk.qcow2
  liveblk mirror --format raw --existing --copy-mode write-blocking /dev/vg0/disk /dev/ublkb0
  liveblk mirror --name vm1 --no-pivot --speed 200M /backup/vm1.qcow2"
)]
pub(super) struct MirrorArguments {
    #[command(flatten)]
    pub(super) job: ChainJobArguments,

    /// File of the copy, or a device with --existing
    #[arg(value_name = "FILE")]
    pub(super) file: PathBuf,

    /// The chain: a device path, the id of an export, or the node-name of an active layer; needed if more
    /// than one node is exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// Format of the copy; what the extension of FILE says if not given
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,

    /// Copy to an image that is there, of the same size
    #[arg(long)]
    pub(super) existing: bool,

    /// How much is copied
    #[arg(long, value_enum, value_name = "MODE", default_value = "full")]
    pub(super) sync: Sync,

    /// Node-name of the copy; made of FILE's name if not given
    #[arg(long, value_name = "NODE")]
    pub(super) node: Option<String>,

    /// What happens to writes to the active layer meanwhile; background if not given
    #[arg(long, value_enum, value_name = "MODE")]
    pub(super) copy_mode: Option<CopyMode>,

    /// Return when both are in step, and leave the active layer in its place
    #[arg(long, conflicts_with = "no_pivot")]
    pub(super) no_complete: bool,

    /// End the job when both are in step, and leave the active layer in its place
    #[arg(long)]
    pub(super) no_pivot: bool,
}

/// List the jobs of an instance, the oldest first.
///
/// A line has the job's id, its kind, its state, how far it is, and what limits or has ended it.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk jobs
  liveblk jobs --name vm1 --output json"
)]
pub(super) struct JobsArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// How to write it
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,
}

/// Which job.
#[derive(Args, Debug)]
pub(super) struct JobArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// The job's id
    #[arg(value_name = "ID")]
    pub(super) id: String,
}

#[derive(Args, Debug)]
pub(super) struct CancelArguments {
    #[command(flatten)]
    pub(super) job: JobArguments,

    /// At once: also a paused job, and one that is ready does not end well
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Args, Debug)]
pub(super) struct CompleteArguments {
    #[command(flatten)]
    pub(super) job: JobArguments,

    /// Return when the job has ended
    #[arg(short, long)]
    pub(super) wait: bool,
}

#[derive(Args, Debug)]
pub(super) struct SetSpeedArguments {
    #[command(flatten)]
    pub(super) job: JobArguments,

    /// Bytes a second at most: a number, or with a suffix k, M, G; 0 is no limit
    #[arg(value_name = "BYTES", value_parser = size::parse)]
    pub(super) speed: u64,
}

/// Do something to a job.
#[derive(Debug, Subcommand)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk job pause stream0
  liveblk job set-speed stream0 50M
  liveblk job complete --wait commit0
  liveblk job cancel --name vm1 --force commit0"
)]
pub(super) enum JobCommand {
    /// Stop for a while
    Pause(JobArguments),
    /// Go on, also after an I/O error
    Resume(JobArguments),
    /// End it before its work is done; a mirror, or a commit of the active layer, that is ready ends well, and the active layer stays
    Cancel(CancelArguments),
    /// Let the base or the copy take the active layer's place, once the commit or mirror is ready
    Complete(CompleteArguments),
    /// Let it take its last steps, where it was started so that it waits for that
    Finalize(JobArguments),
    /// Forget a job that has ended
    Dismiss(JobArguments),
    /// Give it another speed limit
    SetSpeed(SetSpeedArguments),
    /// Show the progress until it has ended (or is ready), tell how, and forget it
    Wait(JobArguments),
}

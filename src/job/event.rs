//! What happens to jobs, for those who watch.

use super::Status;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Makes an image; touches no graph.
    Create,
    /// Pulls what is below a node into it.
    Stream,
    /// Pushes what is above a node into it.
    Commit,
    /// Copies a device and follows it.
    Mirror,
    /// Copies what a node holds at the start of the job.
    Backup,
}

impl JobKind {
    /// The name in QMP and in messages.
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Create => "create",
            JobKind::Stream => "stream",
            JobKind::Commit => "commit",
            JobKind::Mirror => "mirror",
            JobKind::Backup => "backup",
        }
    }

    /// It works on the block graph: `query-block-jobs` lists it, `BLOCK_JOB_*` events tell of it.
    pub fn is_block_job(self) -> bool {
        self != JobKind::Create
    }
}

/// How far a job is, in bytes of work (or whatever unit its kind has).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub current: u64,
    /// Done and to do, as far as is known.
    pub total: u64,
}

/// Which side of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading from the source.
    Read,
    /// Writing to the target.
    Write,
}

impl Operation {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// What is done about an I/O error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job is paused until it is resumed.
    Stop,
}

impl ErrorAction {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            ErrorAction::Report => "report",
            ErrorAction::Ignore => "ignore",
            ErrorAction::Stop => "stop",
        }
    }
}

/// What events about block jobs carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobReport {
    /// The job's id.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// How far it is.
    pub progress: Progress,
    /// Its speed limit in bytes per second; 0 is none.
    pub speed: u64,
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// It has entered a state.
    StatusChange {
        /// The job's id.
        id: String,
        /// The state.
        status: Status,
    },
    /// A block job is in step with the guest.
    Ready(BlockJobReport),
    /// A block job waits for `finalize`.
    Pending {
        /// The job's id.
        id: String,
        /// What it does.
        kind: JobKind,
    },
    /// A block job has ended by itself.
    Completed(BlockJobReport, Option<String>),
    /// A block job was cancelled.
    Cancelled(BlockJobReport),
    /// An I/O request of a block job has failed.
    Error {
        /// The job's id.
        id: String,
        /// Which side.
        operation: Operation,
        /// What is done about it.
        action: ErrorAction,
    },
}

impl JobEvent {
    /// The job is over: what it has done to the graph is done.
    pub fn is_end(&self) -> bool {
        matches!(self, JobEvent::StatusChange { status, .. } if *status == Status::Concluded)
    }
}

//! What a job does about I/O errors (QEMU's `BlockdevOnError`).

use nix::errno::Errno;

use super::{ErrorAction, Operation};
use crate::error::Error;

/// The policy of one side of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// The job fails.
    #[default]
    Report,
    /// The job goes on.
    Ignore,
    /// The job is paused.
    Stop,
    /// Paused where there is no space left, else it fails.
    NoSpace,
}

/// The policies of both sides of a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorPolicies {
    /// Where reading fails.
    pub on_source_error: ErrorPolicy,
    /// Where writing fails.
    pub on_target_error: ErrorPolicy,
}

impl ErrorPolicies {
    /// The same for both sides.
    pub fn both(policy: ErrorPolicy) -> ErrorPolicies {
        ErrorPolicies {
            on_source_error: policy,
            on_target_error: policy,
        }
    }

    pub(super) fn of(self, operation: Operation) -> ErrorPolicy {
        match operation {
            Operation::Read => self.on_source_error,
            Operation::Write => self.on_target_error,
        }
    }
}

/// Whether a job's I/O works, as queries show it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No error since it was started or resumed.
    #[default]
    Ok,
    /// Stopped by an error.
    Failed,
    /// Stopped for want of space.
    NoSpace,
}

impl ErrorPolicy {
    /// The policy of this name in QMP; `auto` is that of guest devices, which for jobs is `enospc`.
    pub fn named(name: &str) -> Option<ErrorPolicy> {
        match name {
            "report" => Some(ErrorPolicy::Report),
            "ignore" => Some(ErrorPolicy::Ignore),
            "stop" => Some(ErrorPolicy::Stop),
            "enospc" | "auto" => Some(ErrorPolicy::NoSpace),
            _ => None,
        }
    }

    /// What is done about this error.
    pub fn action(self, error: &Error) -> ErrorAction {
        match self {
            ErrorPolicy::Report => ErrorAction::Report,
            ErrorPolicy::Ignore => ErrorAction::Ignore,
            ErrorPolicy::Stop => ErrorAction::Stop,
            ErrorPolicy::NoSpace if error.errno() == Errno::ENOSPC => ErrorAction::Stop,
            ErrorPolicy::NoSpace => ErrorAction::Report,
        }
    }
}

impl IoStatus {
    /// The status after a job was stopped by this error.
    pub fn after(error: &Error) -> IoStatus {
        if error.errno() == Errno::ENOSPC {
            IoStatus::NoSpace
        } else {
            IoStatus::Failed
        }
    }

    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_disk_stops_where_that_was_asked_for() {
        let policy = ErrorPolicy::NoSpace;
        assert_eq!(policy.action(&Errno::ENOSPC.into()), ErrorAction::Stop);
        assert_eq!(policy.action(&Errno::EIO.into()), ErrorAction::Report);
        assert_eq!(ErrorPolicy::named("auto"), Some(policy));
        assert_eq!(ErrorPolicy::named("nosuch"), None);
    }
}

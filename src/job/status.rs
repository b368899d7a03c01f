//! The states of a job and what may be done to it in each (QEMU's `JobStatus` and `JobVerb`).

use crate::error::{Error, ErrorKind, Result};

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not there yet; never seen by clients.
    Undefined,
    /// Registered, nothing done.
    Created,
    /// At work.
    Running,
    /// Stopped by its user or by an error, before it was ready.
    Paused,
    /// In step with the guest; may be completed.
    Ready,
    /// Stopped while ready.
    Standby,
    /// Its own work is done; others of its transaction are not.
    Waiting,
    /// All work is done; the last steps wait for `finalize`.
    Pending,
    /// Failed or cancelled; cleans up.
    Aborting,
    /// Over; remembered until it is dismissed.
    Concluded,
    /// Gone; the last thing told of it.
    Null,
}

/// What users do to jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// End it before its work is done.
    Cancel,
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// Another speed limit.
    SetSpeed,
    /// Leave the ready state with success.
    Complete,
    /// Take the last steps.
    Finalize,
    /// Forget it.
    Dismiss,
    /// Other options while it runs.
    Change,
}

impl Status {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Status::Undefined => "undefined",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// A job in this state may go to `next`.
    pub fn may_become(self, next: Status) -> bool {
        use Status::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby,
            Undefined, Waiting,
        };
        let allowed: &[Status] = match self {
            Undefined => &[Created],
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        allowed.contains(&next)
    }

    /// The verb may be applied in this state.
    pub fn accepts(self, verb: Verb) -> bool {
        use Status::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let at_work = matches!(self, Created | Running | Paused | Ready | Standby);
        match verb {
            Verb::Cancel => at_work || matches!(self, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => at_work,
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Its work has ended, well or not.
    pub fn is_over(self) -> bool {
        matches!(self, Status::Concluded | Status::Null)
    }

    /// It has been in step with the guest and may still be.
    pub fn is_ready(self) -> bool {
        matches!(self, Status::Ready | Status::Standby)
    }
}

impl Verb {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        }
    }

    /// The verb may be applied to the job of this name in this state.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check(self, id: &str, status: Status) -> Result<()> {
        if status.accepts(self) {
            return Ok(());
        }
        let (status, verb) = (status.name(), self.name());
        let message = format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'");
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Status; 11] = [
        Status::Undefined,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ready,
        Status::Standby,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    #[test]
    fn every_state_can_reach_the_end() {
        for start in ALL {
            let mut reached = vec![start];
            let mut index = 0;
            while index < reached.len() {
                let here = reached[index];
                let next = ALL.into_iter().filter(|next| here.may_become(*next));
                let new: Vec<Status> = next.filter(|next| !reached.contains(next)).collect();
                reached.extend(new);
                index += 1;
            }
            assert!(reached.contains(&Status::Null), "{start:?} is a dead end");
        }
    }

    #[test]
    fn only_concluded_jobs_are_dismissed_and_only_pending_ones_finalized() {
        let accepting = |verb| -> Vec<Status> {
            let all = ALL.into_iter();
            all.filter(|status| status.accepts(verb)).collect()
        };
        assert_eq!(accepting(Verb::Dismiss), [Status::Concluded]);
        assert_eq!(accepting(Verb::Finalize), [Status::Pending]);
        assert_eq!(accepting(Verb::Complete), [Status::Ready, Status::Standby]);
    }

    #[test]
    fn refusals_are_in_qemus_words() {
        let refused = Verb::SetSpeed.check("j", Status::Concluded);
        assert_eq!(
            refused.map_err(|error| error.message().to_owned()),
            Err("Job 'j' in state 'concluded' cannot accept command verb 'set-speed'".into())
        );
    }
}

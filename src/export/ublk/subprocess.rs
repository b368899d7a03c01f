//! STOP and DEL run in a short-lived process of their own.
//!
//! Both wait in the kernel: STOP for requests in flight, DEL for the last user of the character
//! device. Issued by the serving process, a wait that does not end could not even be killed; issued
//! by another, killing the server ends it.

use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;

use super::control::ControlRing;
use super::identity::Identity;
use super::mounts;
use crate::error::{Error, ErrorKind, Result};

/// The hidden first argument.
const MARK: &str = "--ublk-helper";

/// What a helper process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Take the disk away.
    Stop { id: u32, identity: Identity },
    /// Remove the device.
    Delete { id: u32, identity: Identity },
    /// Detach every mount of a ublk disk from this mount namespace.
    DetachMounts,
}

/// To be called first in every binary that may export over ublk: where this process was started as a
/// helper it does its work and returns the exit code; otherwise `None`.
pub fn helper_main() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mark, rest) = arguments.split_first()?;
    if mark != MARK {
        return None;
    }
    let outcome = match Task::parse(rest) {
        Some(task) => task.perform(),
        None => Err(Error::new(
            ErrorKind::InvalidArgument,
            "unknown helper task",
        )),
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("liveblk ublk helper: {error}");
            ExitCode::FAILURE
        }
    })
}

impl Task {
    fn arguments(self) -> Vec<String> {
        let device = |verb: &str, id: u32, identity: Identity| {
            vec![verb.into(), id.to_string(), identity.flags().to_string()]
        };
        match self {
            Task::Stop { id, identity } => device("stop", id, identity),
            Task::Delete { id, identity } => device("delete", id, identity),
            Task::DetachMounts => vec!["detach-mounts".into()],
        }
    }

    fn parse(arguments: &[String]) -> Option<Task> {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match words[..] {
            ["detach-mounts"] => Some(Task::DetachMounts),
            [verb @ ("stop" | "delete"), id, flags] => {
                let id = id.parse().ok()?;
                let identity = Identity::from_flags(flags.parse().ok()?);
                Some(match verb {
                    "stop" => Task::Stop { id, identity },
                    _ => Task::Delete { id, identity },
                })
            }
            _ => None,
        }
    }

    /// Does it in this process.
    pub(super) fn perform(self) -> Result<()> {
        match self {
            Task::Stop { id, identity } => with_device(id, identity, ControlRing::stop),
            Task::Delete { id, identity } => with_device(id, identity, ControlRing::delete),
            Task::DetachMounts => mounts::detach_ublk_mounts(),
        }
    }

    /// Does it in a process of its own and waits for that.
    pub(super) fn run(self) -> Result<()> {
        let status = Command::new("/proc/self/exe")
            .arg(MARK)
            .args(self.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .map_err(|error| Error::from(error).context("Could not start a helper process"))?;
        if status.success() {
            return Ok(());
        }
        let message = format!("helper process for {self:?}: {status}");
        Err(Error::from_errno(Errno::EIO, message))
    }
}

/// A device that is gone, or whose id somebody else uses by now, needs nothing done.
fn with_device(
    id: u32,
    identity: Identity,
    command: impl Fn(&mut ControlRing, u32) -> Result<()>,
) -> Result<()> {
    let mut ring = ControlRing::open()?;
    let gone = |error: &Error| error.errno() == Errno::ENODEV;
    match ring.info(id) {
        Ok(info) if Identity::from_flags(info.ublksrv_flags) == identity => {}
        Ok(_) => return Ok(()),
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    match command(&mut ring, id) {
        Err(error) if !gone(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_survive_the_command_line() {
        let identity = Identity::from_flags(u64::MAX - 5);
        for task in [
            Task::Stop { id: 7, identity },
            Task::Delete { id: 0, identity },
            Task::DetachMounts,
        ] {
            assert_eq!(Task::parse(&task.arguments()), Some(task));
        }
        assert_eq!(Task::parse(&["stop".into()]), None);
    }
}

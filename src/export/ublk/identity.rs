//! How this program knows its own devices again: the 64 bits that the kernel keeps for a server.

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::abi::{DeviceInfo, DeviceState};

/// Upper half of the server's flags of every device of this program.
const MAGIC: u32 = u32::from_be_bytes(*b"lblk");

/// Written into a device as it is made: the magic and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity(u64);

impl Identity {
    /// A device that this process makes.
    pub(super) fn own() -> Identity {
        Identity(u64::from(MAGIC) << 32 | u64::from(std::process::id()))
    }

    pub(super) fn from_flags(flags: u64) -> Identity {
        Identity(flags)
    }

    pub(super) fn flags(self) -> u64 {
        self.0
    }

    fn is_ours(self) -> bool {
        (self.0 >> 32) as u32 == MAGIC
    }

    /// The process that made the device has ended.
    fn is_orphaned(self) -> bool {
        let pid = Pid::from_raw(self.0 as u32 as i32);
        pid.as_raw() <= 0 || kill(pid, None) == Err(Errno::ESRCH)
    }
}

/// A device that a process of this program left behind: no disk, and nobody to serve it. (A device
/// that a living process is just making has no disk either.)
pub(super) fn is_left_behind(info: &DeviceInfo) -> bool {
    let identity = Identity::from_flags(info.ublksrv_flags);
    DeviceState::of(info) == DeviceState::Dead && identity.is_ours() && identity.is_orphaned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_devices_of_ended_processes_are_left_behind() {
        let mut info = DeviceInfo {
            ublksrv_flags: Identity::own().flags(),
            ..DeviceInfo::default()
        };
        assert!(!is_left_behind(&info), "this process lives");
        let mut child = std::process::Command::new("true").spawn().expect("child");
        let pid = child.id();
        child.wait().expect("child ends");
        info.ublksrv_flags = u64::from(MAGIC) << 32 | u64::from(pid);
        assert!(is_left_behind(&info));
        info.state = libublk::sys::UBLK_S_DEV_LIVE as u16;
        assert!(!is_left_behind(&info), "it has a disk");
        info.state = 0;
        info.ublksrv_flags = u64::from(pid);
        assert!(!is_left_behind(&info), "somebody else's");
    }
}

//! What this machine's ublk can do, and what to say where it cannot.

use std::io;

use nix::errno::Errno;

use super::abi::{Features, ZERO_COPY_FEATURES};
use super::control::ControlRing;
use crate::error::{Error, ErrorKind, Result};

/// The driver's control device.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// Asks the driver; the error says what is missing and what to do about it.
pub(super) fn detect(ring: &mut ControlRing) -> Result<Features> {
    ring.features().map_err(|error| match error.errno() {
        Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTTY => {
            unsupported("the ublk driver of this kernel is too old: Linux 6.5 or later is needed")
        }
        Errno::EPERM | Errno::EACCES => not_permitted(),
        _ => error.context("Could not ask the ublk driver for its features"),
    })
}

/// Why the control device could not be opened.
pub(super) fn explain_open(error: &io::Error) -> Error {
    match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
        Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => unsupported(
            "there is no /dev/ublk-control: the ublk driver is not loaded; run 'modprobe ublk_drv' \
             (the kernel needs CONFIG_BLK_DEV_UBLK)",
        ),
        Errno::EPERM | Errno::EACCES => not_permitted(),
        errno => Error::sys(errno, "Could not open '/dev/ublk-control'"),
    }
}

/// Why a device could not be made.
pub(super) fn explain_add(error: Error, id: Option<u32>) -> Error {
    match (error.errno(), id) {
        (Errno::EPERM | Errno::EACCES, _) => not_permitted(),
        (Errno::EEXIST, Some(id)) => Error::new(
            ErrorKind::InUse,
            format!("ublk device {id} exists already; choose another 'device-id'"),
        ),
        (Errno::ENOSPC, _) => error.context(
            "No more ublk devices can be made; see /sys/module/ublk_drv/parameters/ublks_max",
        ),
        _ => error.context("Could not add a ublk device"),
    }
}

/// A device that an ended daemon left behind keeps its id as long as its disk is in use.
pub(super) fn left_behind_in_use(id: u32) -> Error {
    Error::new(
        ErrorKind::InUse,
        format!(
            "ublk device {id} of a daemon that has ended is still in use: unmount /dev/ublkb{id} \
             and close it, or choose another 'device-id'"
        ),
    )
}

/// What zero copy lacks here; `None` where nothing is missing.
pub(super) fn zero_copy_obstacle(features: Features, buffer_slots_free: bool) -> Option<String> {
    if !features.contains(ZERO_COPY_FEATURES) {
        return Some("zero copy needs Linux 6.16 or later".into());
    }
    if !buffer_slots_free {
        return Some("no slots for registered buffers are left in the I/O thread's ring".into());
    }
    None
}

fn unsupported(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

fn not_permitted() -> Error {
    Error::new(
        ErrorKind::Permission,
        "ublk devices need root (CAP_SYS_ADMIN) and access to /dev/ublk-control",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let missing = explain_open(&io::Error::from_raw_os_error(libc::ENOENT));
        assert!(missing.message().contains("modprobe ublk_drv"));
        assert_eq!(missing.kind(), ErrorKind::Unsupported);
        let forbidden = explain_open(&io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(forbidden.kind(), ErrorKind::Permission);
        let taken = explain_add(Error::from(Errno::EEXIST), Some(3));
        assert!(taken.message().contains("ublk device 3"));
    }

    #[test]
    fn zero_copy_wants_every_part_of_it() {
        assert_eq!(zero_copy_obstacle(ZERO_COPY_FEATURES, true), None);
        assert!(zero_copy_obstacle(ZERO_COPY_FEATURES, false).is_some());
        let without = ZERO_COPY_FEATURES - Features::USER_COPY;
        assert!(zero_copy_obstacle(without, true).is_some());
    }
}

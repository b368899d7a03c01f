//! Files of a ring: an owned descriptor and, where there is room, a slot in the registered table.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::{Rc, Weak};

use io_uring::{IoUring, squeue, types};

use super::{Ring, Shared};

/// A file that operations of one ring use. The slot is released and the descriptor closed when the
/// last user is gone; operations in flight are users.
pub struct RingFile {
    descriptor: OwnedFd,
    slot: Option<u32>,
    ring: Weak<Shared>,
}

impl RingFile {
    /// The entry's target: what to build it with, and the flags it needs.
    pub(super) fn target(&self) -> (types::Fd, squeue::Flags) {
        match self.slot {
            Some(slot) => (types::Fd(slot as RawFd), squeue::Flags::FIXED_FILE),
            None => (
                types::Fd(self.descriptor.as_raw_fd()),
                squeue::Flags::empty(),
            ),
        }
    }

    /// Has a slot in the ring's table of registered files.
    pub fn is_registered(&self) -> bool {
        self.slot.is_some()
    }
}

impl AsFd for RingFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for RingFile {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && let Some(shared) = self.ring.upgrade()
        {
            shared.slots.release(&shared.uring.borrow(), slot);
        }
    }
}

impl Ring {
    /// Takes the descriptor and registers it where a slot is free. It must be a blocking one: on an
    /// `O_NONBLOCK` descriptor operations fail with `EAGAIN` instead of waiting.
    pub fn file(&self, descriptor: OwnedFd) -> Rc<RingFile> {
        let uring = self.shared.uring.borrow();
        let slot = self.shared.slots.claim(&uring, descriptor.as_raw_fd());
        Rc::new(RingFile {
            descriptor,
            slot,
            ring: Rc::downgrade(&self.shared),
        })
    }
}

/// Free slots of the table of registered files.
pub(super) struct FileSlots {
    free: RefCell<Vec<u32>>,
}

impl FileSlots {
    /// Registers a sparse table; one without slots where the kernel refuses, or would keep a file
    /// open whose slot was released.
    pub(super) fn register(uring: &IoUring, wanted: u32) -> FileSlots {
        let wanted = if releases_files_at_once() { wanted } else { 0 };
        let registered = wanted > 0 && uring.submitter().register_files_sparse(wanted).is_ok();
        let free = if registered {
            (0..wanted).rev().collect()
        } else {
            Vec::new()
        };
        FileSlots {
            free: RefCell::new(free),
        }
    }

    fn claim(&self, uring: &IoUring, descriptor: RawFd) -> Option<u32> {
        let slot = self.free.borrow_mut().pop()?;
        match uring.submitter().register_files_update(slot, &[descriptor]) {
            Ok(_) => Some(slot),
            Err(error) => {
                tracing::debug!(%error, "file not registered with the ring");
                self.free.borrow_mut().push(slot);
                None
            }
        }
    }

    fn release(&self, uring: &IoUring, slot: u32) {
        match uring.submitter().register_files_update(slot, &[-1]) {
            Ok(_) => self.free.borrow_mut().push(slot),
            Err(error) => tracing::warn!(%error, slot, "file slot not released"),
        }
    }
}

/// Before Linux 6.13 a released slot keeps its file until every operation has ended that was begun
/// with any registered file before: one that waits for a client pins a ublk device that is to be
/// deleted, for ever.
fn releases_files_at_once() -> bool {
    let Ok(kernel) = nix::sys::utsname::uname() else {
        return false;
    };
    let release = kernel.release().to_string_lossy();
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 13),
        _ => false,
    }
}

//! The kernel's table of requests of one queue, mapped read-only.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::abi::{Description, IoDescriptor, MOST_QUEUE_DEPTH};
use crate::error::{Error, Result};

/// The mapping. While it lives the device cannot be removed.
pub(super) struct Descriptors {
    base: NonNull<IoDescriptor>,
    depth: u16,
    bytes: usize,
}

impl Descriptors {
    /// Maps the table of queue `queue` of the character device.
    pub(super) fn map(device: BorrowedFd<'_>, queue: u16, depth: u16) -> Result<Descriptors> {
        let bytes = pages(usize::from(depth) * size_of::<IoDescriptor>());
        let stride = pages(usize::from(MOST_QUEUE_DEPTH) * size_of::<IoDescriptor>());
        let offset = (stride * usize::from(queue)) as libc::off_t;
        let length =
            NonZeroUsize::new(bytes).ok_or_else(|| Error::from(nix::errno::Errno::EINVAL))?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, length, ProtFlags::PROT_READ, flags, device, offset) };
        let base = base.map_err(|errno| Error::sys(errno, "Could not map the ublk queue"))?;
        Ok(Descriptors {
            base: base.cast(),
            depth,
            bytes,
        })
    }

    /// The request that a completed fetch of `tag` announces.
    pub(super) fn read(&self, tag: u16) -> Description {
        assert!(tag < self.depth, "tag {tag} of a queue of {}", self.depth);
        // SAFETY: inside the mapping; the kernel writes it only before it completes the fetch.
        let descriptor = unsafe { self.base.add(usize::from(tag)).read_volatile() };
        Description::of(&descriptor)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: this mapping, once; nothing refers to it any more.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

fn pages(bytes: usize) -> usize {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let page = page.ok().flatten().map_or(4096, |size| size as usize);
    bytes.next_multiple_of(page)
}

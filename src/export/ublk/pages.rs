//! The pages of a request, registered with the ring and reachable byte by byte.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;

use libublk::sys;
use nix::errno::Errno;

use crate::buffer::{KernelBuffer, MemorySlice};
use crate::error::{Error, Result};
use crate::runtime::ring::RingFile;

/// The pages of whatever request a tag carries now. Revoked when something still holds it after the
/// request was answered: then the tag's next request gets another one.
pub(super) struct RequestPages {
    device: Rc<RingFile>,
    /// Where the character device shows the request's first byte.
    position: u64,
    slot: u16,
    length: Cell<usize>,
}

impl RequestPages {
    pub(super) fn new(device: Rc<RingFile>, queue: u16, tag: u16, slot: u16) -> RequestPages {
        let position = u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
            + (u64::from(queue) << sys::UBLK_QID_OFF)
            + (u64::from(tag) << sys::UBLK_TAG_OFF);
        RequestPages {
            device,
            position,
            slot,
            length: Cell::new(0),
        }
    }

    /// Others in the same slot, for the tag's next request.
    pub(super) fn successor(&self, device: Rc<RingFile>) -> RequestPages {
        RequestPages {
            device,
            position: self.position,
            slot: self.slot,
            length: Cell::new(0),
        }
    }

    /// Slot in the ring's table.
    pub(super) fn slot(&self) -> u16 {
        self.slot
    }

    /// A request of `length` bytes has come.
    pub(super) fn begin(&self, length: usize) {
        self.length.set(length);
    }

    /// The request is answered: nothing may touch its bytes any more.
    pub(super) fn end(&self) {
        self.length.set(0);
    }

    /// Copies a guest write's bytes from `offset` into all of `bytes`.
    pub(super) fn fetch(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.copy(offset, bytes, |descriptor, pointer, length, position| {
            // SAFETY: `pointer` is the start of `length` bytes that the slice keeps alive.
            unsafe { libc::pread(descriptor, pointer.cast(), length, position) }
        })
    }

    /// Copies all of `bytes` into a guest read at `offset`.
    pub(super) fn store(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.copy(offset, bytes, |descriptor, pointer, length, position| {
            // SAFETY: `pointer` is the start of `length` bytes that the slice keeps alive.
            unsafe { libc::pwrite(descriptor, pointer.cast(), length, position) }
        })
    }

    /// The character device copies at once and never blocks.
    fn copy(
        &self,
        offset: usize,
        bytes: &MemorySlice,
        call: impl Fn(RawFd, *mut u8, usize, libc::off_t) -> isize,
    ) -> Result<()> {
        if offset + bytes.length() > self.length.get() {
            return Err(Error::from_errno(Errno::ECANCELED, "request is answered"));
        }
        let mut done = 0;
        while done < bytes.length() {
            let rest = bytes.slice(done, bytes.length() - done);
            let position = self.position + (offset + done) as u64;
            let descriptor = self.device.as_fd().as_raw_fd();
            let copied = call(
                descriptor,
                rest.as_ptr(),
                rest.length(),
                position as libc::off_t,
            );
            match Errno::result(copied) {
                Ok(0) => return Err(Error::from_errno(Errno::EIO, "request is shorter")),
                Ok(count) => done += count as usize,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys(errno, "Could not copy a request's bytes")),
            }
        }
        Ok(())
    }
}

impl KernelBuffer for RequestPages {
    fn index(&self) -> u16 {
        self.slot
    }

    fn length(&self) -> usize {
        self.length.get()
    }

    fn copy_out(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.fetch(offset, bytes)
    }

    fn copy_in(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.store(offset, bytes)
    }
}

//! Writes of another file's bytes: inside the kernel where it can, on a helper thread always.
//!
//! The cheapest way that both files allow, then the next for what is left: sharing of blocks
//! (reflink), copy_file_range(2) where a server does the copying (a local file system goes page by page
//! there, all the time with the file locked), reads and writes through a buffer. Only the last tells
//! which side an error comes from, so every error ends there.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::block::WriteFlags;
use crate::buffer::{FileSlice, MemorySlice};
use crate::error::{Error, Result};
use crate::range::{align_down, is_aligned};

use super::File;
use super::device::{self, DeviceKind};

/// Between cached files: what stays in the processor's cache.
const CACHED_PIECE: usize = 256 << 10;

/// Past the cache: what keeps a disk busy.
const DIRECT_PIECE: usize = 2 << 20;

/// Where the bytes go.
struct Target {
    file: Arc<OwnedFd>,
    offset: u64,
    direct: bool,
    /// Offsets and lengths of direct writes.
    alignment: u64,
    /// Sharing blocks is worth a try.
    clones: bool,
}

/// What has become of a copy.
struct Copied {
    /// Bytes that were written.
    length: u64,
    /// The file cannot share blocks.
    clone_refused: bool,
    result: Result<()>,
}

impl File {
    /// Writes all bytes of the slice.
    pub(super) async fn write_slice(
        &self,
        offset: u64,
        slice: FileSlice,
        flags: WriteFlags,
    ) -> Result<()> {
        let target = self.target(offset, &slice);
        let copied = self.handle.background(move || copy(&target, &slice)).await;
        // Also a failed copy may have written something.
        self.count_change();
        if copied.clone_refused {
            self.clones.set(false);
        }
        if copied.length > 0 {
            self.written_to(offset + copied.length);
        }
        let at = offset + copied.length;
        copied
            .result
            .map_err(|error| self.describe("write", at, error))?;
        if flags.contains(WriteFlags::FUA) {
            self.sync().await
        } else {
            Ok(())
        }
    }

    /// Past the cache the ring keeps more in flight than a helper thread, and needs no copying either;
    /// there only sharing blocks is better.
    pub(super) fn gains_by(&self, slice: &FileSlice) -> bool {
        let cached = !self.descriptor().access().direct && !slice.file().direct;
        cached || self.may_clone(slice)
    }

    fn may_clone(&self, slice: &FileSlice) -> bool {
        self.clones.get()
            && self.device == DeviceKind::File
            && self.descriptor().device() == slice.file().device
    }

    fn target(&self, offset: u64, slice: &FileSlice) -> Target {
        let descriptor = self.descriptor();
        let block = u64::from(self.block_size);
        Target {
            file: descriptor.shared(),
            offset,
            direct: descriptor.access().direct,
            alignment: u64::from(self.alignment.get().request),
            clones: self.may_clone(slice)
                && is_aligned(offset | slice.start() | slice.length(), block),
        }
    }
}

/// Runs on a helper thread.
fn copy(target: &Target, slice: &FileSlice) -> Copied {
    let mut copied = Copied {
        length: 0,
        clone_refused: false,
        result: Ok(()),
    };
    if target.clones {
        match clone(target, slice) {
            Ok(()) => {
                copied.length = slice.length();
                return copied;
            }
            Err(errno) => copied.clone_refused = is_refusal(errno),
        }
    }
    if !target.direct && !slice.file().direct && device::has_server(&target.file) {
        copied.length = copy_in_kernel(target, slice);
    }
    copied.result = copy_through_memory(target, slice, &mut copied.length);
    copied
}

fn clone(target: &Target, slice: &FileSlice) -> Result<(), Errno> {
    let source = slice.file().descriptor.as_raw_fd();
    device::clone_range(
        &target.file,
        source,
        [slice.start(), slice.length(), target.offset],
    )
}

/// Says something of the files, not of this one range.
fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY
    )
}

/// As far as it goes without an error; the bytes copied.
fn copy_in_kernel(target: &Target, slice: &FileSlice) -> u64 {
    let mut done = 0;
    while done < slice.length() {
        let (Ok(mut from), Ok(mut to)) = (
            i64::try_from(slice.start() + done),
            i64::try_from(target.offset + done),
        ) else {
            break;
        };
        let rest = usize::try_from(slice.length() - done).unwrap_or(usize::MAX);
        let copied = nix::fcntl::copy_file_range(
            slice.file().descriptor.as_fd(),
            Some(&mut from),
            target.file.as_fd(),
            Some(&mut to),
            rest,
        );
        match copied {
            Ok(0) | Err(_) => break,
            Ok(count) => done += count as u64,
        }
    }
    done
}

/// The rest from `done` on, which it moves along.
fn copy_through_memory(target: &Target, slice: &FileSlice, done: &mut u64) -> Result<()> {
    if *done == slice.length() {
        return Ok(());
    }
    // A direct write goes on at a multiple of its alignment.
    *done = align_down(*done, target.alignment);
    let piece = if target.direct || slice.file().direct {
        DIRECT_PIECE
    } else {
        CACHED_PIECE
    };
    let buffer = buffer(piece);
    while *done < slice.length() {
        let length = piece.min((slice.length() - *done) as usize);
        let part = buffer.slice(0, length);
        slice.read(*done, &part)?;
        let mut written = 0;
        while written < length {
            let rest = part.slice(written, length - written);
            let count = rest.write_to(&target.file, target.offset + *done + written as u64)?;
            let next = align_down((written + count) as u64, target.alignment) as usize;
            if next <= written && written + count < length {
                return Err(Error::from(Errno::ENOSPC));
            }
            written = if written + count == length {
                length
            } else {
                next
            };
        }
        *done += length as u64;
    }
    Ok(())
}

/// Memory of this thread, kept: new memory would have to be found and cleared for each copy.
fn buffer(length: usize) -> MemorySlice {
    thread_local! {
        static KEPT: RefCell<Option<MemorySlice>> = const { RefCell::new(None) };
    }
    KEPT.with_borrow_mut(|kept| match kept {
        Some(buffer) if buffer.length() >= length => buffer.slice(0, length),
        _ => kept.insert(MemorySlice::zeroed(length)).clone(),
    })
}

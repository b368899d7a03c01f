//! Space of a file: zeroes, discard, and what is a hole.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek};

use crate::block::{Extent, ZeroFlags};
use crate::error::{Error, Result};
use crate::range::ByteRange;

use super::File;
use super::device::{self, DeviceKind};

impl File {
    /// Makes the range read as zeroes without writing data, or fails with `EOPNOTSUPP`.
    pub(super) async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if self.device == DeviceKind::Character {
            return Err(unsupported());
        }
        let inside = self.device == DeviceKind::Block || range.end() <= self.length.get();
        let result = if inside && flags.contains(ZeroFlags::MAY_UNMAP) {
            self.punch_or_zero(range).await
        } else {
            self.zero_allocated(range, inside).await
        };
        result.map_err(|error| self.describe("zeroing", range.start(), error))?;
        self.written_to(range.end());
        if flags.contains(ZeroFlags::FUA) {
            self.sync().await
        } else {
            Ok(())
        }
    }

    async fn punch_or_zero(&self, range: ByteRange) -> Result<()> {
        match self.punch(range).await {
            Err(error) if is_unsupported(&error) => self.zero_allocated(range, true).await,
            result => result,
        }
    }

    /// Zeroes that keep or get space. A range past the end makes the file longer.
    async fn zero_allocated(&self, range: ByteRange, inside: bool) -> Result<()> {
        if self.zero_range.get() {
            let keep = if inside {
                FallocateFlags::FALLOC_FL_KEEP_SIZE
            } else {
                FallocateFlags::empty()
            };
            let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | keep;
            match self.fallocate(mode, range).await {
                Err(error) if is_unsupported(&error) => self.zero_range.set(false),
                result => return result,
            }
        }
        if self.device == DeviceKind::Block {
            return Err(unsupported());
        }
        self.punch(range).await?;
        self.fallocate(FallocateFlags::empty(), range).await
    }

    /// Gives space back; the range reads as zeroes.
    async fn punch(&self, range: ByteRange) -> Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, range).await
    }

    async fn fallocate(&self, mode: FallocateFlags, range: ByteRange) -> Result<()> {
        let file = self.descriptor().ring_file();
        let call = self
            .handle
            .ring()
            .fallocate(&file, mode, range.start(), range.length());
        match call.await {
            // Old file systems and block devices refuse modes and alignments with these.
            Err(error)
                if matches!(error.errno(), Errno::EINVAL | Errno::ENOSYS | Errno::ENODEV) =>
            {
                Err(unsupported())
            }
            result => result,
        }
    }

    /// A hint: the range is not needed.
    pub(super) async fn give_back(&self, range: ByteRange) -> Result<()> {
        let result = match self.device {
            DeviceKind::Block => self.discard_device(range).await,
            DeviceKind::File => self.punch_inside(range).await,
            _ => Err(unsupported()),
        };
        let mut count = self.discards.get();
        if result.is_ok() {
            self.count_change();
            count.succeeded += 1;
            count.bytes += range.length();
        } else {
            count.failed += 1;
        }
        self.discards.set(count);
        result.map_err(|error| self.describe("discard", range.start(), error))
    }

    async fn punch_inside(&self, range: ByteRange) -> Result<()> {
        let file = ByteRange::between(0, self.length.get());
        match range.intersection(&file) {
            Some(inside) => self.punch(inside).await,
            None => Ok(()),
        }
    }

    async fn discard_device(&self, range: ByteRange) -> Result<()> {
        let shared = self.descriptor().shared();
        let call = move || device::discard(&shared, range.start(), range.length());
        Ok(self.handle.blocking(call).await?)
    }

    /// Data or hole, as the file system tells.
    pub(super) async fn status(&self, range: ByteRange) -> Result<Extent> {
        if self.device != DeviceKind::File {
            return Ok(Extent::data(range.length(), range.start()));
        }
        let shared = self.descriptor().shared();
        let start = range.start();
        let found = self.handle.blocking(move || find(&shared, start)).await;
        let found = found.map_err(|errno| self.describe("seek", start, Error::from(errno)))?;
        let length = |end: u64| end.min(range.end()) - start;
        Ok(match found {
            Found::Data { end } => Extent::data(length(end.max(start + 1)), start),
            Found::Hole { end } => Extent::zero(length(end.max(start + 1))),
            Found::HoleToEnd => Extent::zero(range.length()),
        })
    }
}

/// What lies at an offset, and where that ends.
enum Found {
    Data { end: u64 },
    Hole { end: u64 },
    HoleToEnd,
}

fn find(file: &OwnedFd, start: u64) -> Result<Found, Errno> {
    let Ok(at) = i64::try_from(start) else {
        return Ok(Found::HoleToEnd);
    };
    match lseek(file, at, Whence::SeekData) {
        Ok(data) if data > at => Ok(Found::Hole { end: data as u64 }),
        Ok(_) => {
            let end = lseek(file, at, Whence::SeekHole)?;
            Ok(Found::Data { end: end as u64 })
        }
        Err(Errno::ENXIO) => Ok(Found::HoleToEnd),
        // The file system does not tell.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Found::Data { end: u64::MAX }),
        Err(errno) => Err(errno),
    }
}

fn is_unsupported(error: &Error) -> bool {
    error.errno() == Errno::EOPNOTSUPP
}

fn unsupported() -> Error {
    Error::from(Errno::EOPNOTSUPP)
}

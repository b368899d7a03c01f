//! What a request carries, of whatever kind it is.

use std::fmt;
use std::rc::Rc;

use nix::errno::Errno;

use super::{FileSlice, MemorySlice};
use crate::error::{Error, Result};

/// Pages of a request in the kernel, registered in a slot of the I/O thread's ring.
///
/// Pages of a guest read can only be written to, those of a guest write only be read from; the
/// other direction fails with `EACCES` or `EFAULT`.
pub trait KernelBuffer {
    /// Slot in the ring's table of registered buffers.
    fn index(&self) -> u16;
    /// Bytes in the request.
    fn length(&self) -> usize;
    /// Copies bytes of a guest write out of the request, from `offset`.
    fn copy_out(&self, offset: usize, bytes: &MemorySlice) -> Result<()>;
    /// Copies bytes into a guest read, at `offset`.
    fn copy_in(&self, offset: usize, bytes: &MemorySlice) -> Result<()>;
}

/// A part of a [`KernelBuffer`].
#[derive(Clone)]
pub struct KernelSlice {
    buffer: Rc<dyn KernelBuffer>,
    start: usize,
    length: usize,
}

impl KernelSlice {
    /// The whole buffer.
    pub fn whole(buffer: Rc<dyn KernelBuffer>) -> KernelSlice {
        let length = buffer.length();
        KernelSlice {
            buffer,
            start: 0,
            length,
        }
    }

    /// Slot in the ring's table.
    pub fn index(&self) -> u16 {
        self.buffer.index()
    }

    /// Byte offset inside the registered buffer: what READ_FIXED and WRITE_FIXED take as address.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Bytes in the slice.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// The data of a request: a slice of memory, of a kernel buffer or of a file.
#[derive(Clone)]
pub enum Payload {
    /// Memory of this process.
    Memory(MemorySlice),
    /// Pages of a ublk request.
    Kernel(KernelSlice),
    /// Bytes of another file: of a write only. To touch them blocks in system calls.
    File(FileSlice),
}

impl Payload {
    /// Bytes in the payload.
    pub fn length(&self) -> usize {
        match self {
            Payload::Memory(slice) => slice.length(),
            Payload::Kernel(slice) => slice.length,
            Payload::File(slice) => slice.length() as usize,
        }
    }

    /// `length` bytes from `start`, which must be inside.
    pub fn slice(&self, start: usize, length: usize) -> Payload {
        match self {
            Payload::Memory(slice) => Payload::Memory(slice.slice(start, length)),
            Payload::Kernel(slice) => {
                assert!(start + length <= slice.length, "slice beyond the request");
                let start = slice.start + start;
                Payload::Kernel(KernelSlice {
                    buffer: slice.buffer.clone(),
                    start,
                    length,
                })
            }
            Payload::File(slice) => Payload::File(slice.slice(start as u64, length as u64)),
        }
    }

    /// Fails for the bytes of a file, which no read may fill.
    pub fn check_fillable(&self) -> Result<()> {
        match self {
            Payload::Memory(_) | Payload::Kernel(_) => Ok(()),
            Payload::File(slice) => {
                let message = format!("{slice:?} cannot be filled by a read");
                Err(Error::from_errno(Errno::EINVAL, message))
            }
        }
    }

    /// Fills the payload from `offset` with `bytes` (the payload of a read).
    pub fn copy_in(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        match self {
            Payload::Memory(slice) => slice.copy_from(offset, bytes),
            Payload::Kernel(slice) => {
                assert!(
                    offset + bytes.length() <= slice.length,
                    "copy beyond the request"
                );
                slice.buffer.copy_in(slice.start + offset, bytes)?;
            }
            Payload::File(_) => self.check_fillable()?,
        }
        Ok(())
    }

    /// Copies the payload's bytes from `offset` into all of `bytes` (the payload of a write).
    pub fn copy_out(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        match self {
            Payload::Memory(slice) => bytes.copy_from(0, &slice.slice(offset, bytes.length())),
            Payload::Kernel(slice) => {
                assert!(
                    offset + bytes.length() <= slice.length,
                    "copy beyond the request"
                );
                slice.buffer.copy_out(slice.start + offset, bytes)?;
            }
            Payload::File(slice) => slice.read(offset as u64, bytes)?,
        }
        Ok(())
    }

    /// Sets the whole payload to zero (the payload of a read).
    pub fn fill_zero(&self) -> Result<()> {
        match self {
            Payload::Memory(slice) => slice.fill(0, slice.length(), 0),
            Payload::Kernel(slice) => {
                let zeroes = MemorySlice::zeroed(slice.length.min(ZERO_CHUNK));
                let mut offset = 0;
                while offset < slice.length {
                    let length = zeroes.length().min(slice.length - offset);
                    slice
                        .buffer
                        .copy_in(slice.start + offset, &zeroes.slice(0, length))?;
                    offset += length;
                }
            }
            Payload::File(_) => self.check_fillable()?,
        }
        Ok(())
    }

    /// The payload as memory: itself, or a copy of the bytes of a guest write.
    pub fn to_memory(&self) -> Result<MemorySlice> {
        match self {
            Payload::Memory(slice) => Ok(slice.clone()),
            Payload::Kernel(_) | Payload::File(_) => {
                let memory = MemorySlice::zeroed(self.length());
                self.copy_out(0, &memory)?;
                Ok(memory)
            }
        }
    }

    /// All bytes (of a write) are zero; looks at no more than it must.
    pub fn is_zero(&self) -> Result<bool> {
        let Payload::File(slice) = self else {
            return Ok(self.to_memory()?.is_zero());
        };
        let mut offset = 0;
        while offset < slice.length() {
            let length = (slice.length() - offset).min(ZERO_CHUNK as u64);
            let memory = MemorySlice::zeroed(length as usize);
            slice.read(offset, &memory)?;
            if !memory.is_zero() {
                return Ok(false);
            }
            offset += length;
        }
        Ok(true)
    }
}

impl From<MemorySlice> for Payload {
    fn from(slice: MemorySlice) -> Payload {
        Payload::Memory(slice)
    }
}

impl From<FileSlice> for Payload {
    fn from(slice: FileSlice) -> Payload {
        Payload::File(slice)
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Memory(slice) => slice.fmt(f),
            Payload::Kernel(slice) => {
                write!(
                    f,
                    "kernel buffer {} +{:#x}, {} bytes",
                    slice.index(),
                    slice.start,
                    slice.length
                )
            }
            Payload::File(slice) => slice.fmt(f),
        }
    }
}

const ZERO_CHUNK: usize = 64 * 1024;

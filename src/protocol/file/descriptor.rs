//! One open of a file: for the ring and for system calls on helper threads.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{Whence, dup, ftruncate, lseek};

use crate::error::{Error, Result};
use crate::runtime::Handle;
use crate::runtime::ring::RingFile;

/// Names a file whatever its paths: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Of what `path` leads to now.
    ///
    /// # Errors
    /// The errno of stat(2).
    pub fn of_path(path: &str) -> Result<Identity, Errno> {
        nix::sys::stat::stat(path).map(|status| Identity::of(&status))
    }

    pub(super) fn of(status: &FileStat) -> Identity {
        Identity {
            device: status.st_dev,
            inode: status.st_ino,
        }
    }
}

/// An open file, with the access that it was opened with.
pub(super) struct Descriptor {
    ring_file: Rc<RingFile>,
    shared: Arc<OwnedFd>,
    /// Number of the file system.
    device: u64,
    writable: bool,
    direct: bool,
}

impl Descriptor {
    /// Takes an open file over.
    pub(super) fn new(handle: &Handle, file: OwnedFd, access: Access) -> Result<Descriptor> {
        let shared = Arc::new(dup(file.as_fd())?);
        Ok(Descriptor {
            device: fstat(&*shared)?.st_dev,
            ring_file: handle.ring().file(file),
            shared,
            writable: access.writable,
            direct: access.direct,
        })
    }

    /// Opens the same file again, whatever its name is by now.
    pub(super) fn again(&self, handle: &Handle, access: Access) -> Result<Descriptor, Errno> {
        let file = reopen(&self.shared, access.flags())?;
        Descriptor::new(handle, file, access).map_err(|error| error.errno())
    }

    pub(super) fn ring_file(&self) -> Rc<RingFile> {
        self.ring_file.clone()
    }

    /// For helper threads, which cannot hold the ring's file.
    pub(super) fn shared(&self) -> Arc<OwnedFd> {
        self.shared.clone()
    }

    pub(super) fn access(&self) -> Access {
        Access {
            writable: self.writable,
            direct: self.direct,
        }
    }

    pub(super) fn device(&self) -> u64 {
        self.device
    }

    pub(super) fn identity(&self) -> Result<Identity> {
        Ok(Identity::of(&fstat(&*self.shared)?))
    }

    pub(super) fn allocated_bytes(&self) -> Result<u64> {
        let status = fstat(&*self.shared)?;
        Ok(u64::try_from(status.st_blocks).unwrap_or(0) * 512)
    }
}

/// How a file is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) writable: bool,
    pub(super) direct: bool,
}

impl Access {
    pub(super) fn flags(self) -> OFlag {
        let mode = if self.writable {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        let direct = if self.direct {
            OFlag::O_DIRECT
        } else {
            OFlag::empty()
        };
        mode | direct | OFlag::O_CLOEXEC
    }
}

/// Opens the file behind a descriptor anew: another open file description.
pub(super) fn reopen(file: &impl AsFd, flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    open(path.as_str(), flags, Mode::empty())
}

/// Sets the length of the file in bytes.
pub(super) fn truncate(file: &OwnedFd, length: u64) -> Result<(), Errno> {
    let length = i64::try_from(length).map_err(|_| Errno::EFBIG)?;
    ftruncate(file, length)
}

/// Bytes up to the end of a file or block device.
pub(super) fn length(file: &impl AsFd) -> Result<u64> {
    let end = lseek(file, 0, Whence::SeekEnd)?;
    u64::try_from(end).map_err(|_| Error::from(Errno::EIO))
}

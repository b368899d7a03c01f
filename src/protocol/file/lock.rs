//! Image locking between processes, byte for byte as QEMU does it.
//!
//! Byte `100 + i` of the file is locked by who needs permission `i`, byte `200 + i` by who does not
//! share it. All locks are read locks of an open file description; who wants to know whether
//! somebody else holds one asks for a write lock with `F_OFD_GETLK`.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::block::{Permission, Permissions};
use crate::error::{Error, ErrorKind, Result};

use super::descriptor::reopen;

const NEEDED: i64 = 100;
const UNSHARED: i64 = 200;

/// The lock bytes that a node holds. They live in an open file description of their own, so that
/// reopening the file for other access does not disturb them.
pub(super) struct ImageLock {
    file: OwnedFd,
    held: Cell<Bytes>,
    before: Cell<Bytes>,
}

/// Which bytes: one bit for each permission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bytes {
    needed: Permission,
    unshared: Permission,
}

impl Bytes {
    fn of(users: Permissions) -> Bytes {
        Bytes {
            needed: users.required,
            unshared: users.shared.complement(),
        }
    }
}

impl ImageLock {
    /// No bytes held yet, in the file behind `file`.
    ///
    /// # Errors
    /// The errno of opening it for reading.
    pub(super) fn new(file: &impl AsFd) -> Result<ImageLock, Errno> {
        let file = reopen(file, OFlag::O_RDONLY | OFlag::O_CLOEXEC)?;
        Ok(ImageLock {
            file,
            held: Cell::default(),
            before: Cell::default(),
        })
    }

    /// Adds the bytes for `users` and looks for somebody in the way; then what was held before is
    /// held still, until [`ImageLock::commit`] or [`ImageLock::abort`].
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with QEMU's text; only what was held before is held.
    pub(super) fn prepare(&self, users: Permissions) -> Result<()> {
        let wanted = Bytes::of(users);
        self.before.set(self.held.get());
        if wanted == self.held.get() {
            return Ok(());
        }
        let added = self.add(wanted).and_then(|()| self.look_for_others(wanted));
        if added.is_err() {
            self.abort();
        }
        added
    }

    /// Gives up what `users` does not call for any more.
    pub(super) fn commit(&self, users: Permissions) {
        self.keep_only(Bytes::of(users));
    }

    /// Gives up what was added.
    pub(super) fn abort(&self) {
        self.keep_only(self.before.get());
    }

    /// Gives up everything.
    pub(super) fn release(&self) {
        self.keep_only(Bytes::default());
    }

    fn add(&self, wanted: Bytes) -> Result<()> {
        let held = self.held.get();
        for flag in (wanted.needed - held.needed).iter() {
            self.lock(NEEDED + index(flag))?;
            self.note(|bytes| bytes.needed |= flag);
        }
        for flag in (wanted.unshared - held.unshared).iter() {
            self.lock(UNSHARED + index(flag))?;
            self.note(|bytes| bytes.unshared |= flag);
        }
        Ok(())
    }

    fn look_for_others(&self, wanted: Bytes) -> Result<()> {
        for flag in wanted.needed.iter() {
            if self.is_held_elsewhere(UNSHARED + index(flag))? {
                return Err(in_use(format!("Failed to get \"{}\" lock", flag.names())));
            }
        }
        for flag in wanted.unshared.iter() {
            if self.is_held_elsewhere(NEEDED + index(flag))? {
                let name = flag.names();
                return Err(in_use(format!("Failed to get shared \"{name}\" lock")));
            }
        }
        Ok(())
    }

    fn keep_only(&self, kept: Bytes) {
        let held = self.held.get();
        for flag in (held.needed - kept.needed).iter() {
            self.unlock(NEEDED + index(flag));
        }
        for flag in (held.unshared - kept.unshared).iter() {
            self.unlock(UNSHARED + index(flag));
        }
        self.note(|bytes| {
            bytes.needed &= kept.needed;
            bytes.unshared &= kept.unshared;
        });
    }

    fn note(&self, change: impl FnOnce(&mut Bytes)) {
        let mut held = self.held.get();
        change(&mut held);
        self.held.set(held);
    }

    fn lock(&self, byte: i64) -> Result<()> {
        let range = one_byte(libc::F_RDLCK, byte);
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range))
            .map(drop)
            .map_err(|errno| match errno {
                Errno::EAGAIN | Errno::EACCES => in_use(format!("Failed to lock byte {byte}")),
                other => Error::sys(other, format!("Failed to lock byte {byte}")),
            })
    }

    fn unlock(&self, byte: i64) {
        let range = one_byte(libc::F_UNLCK, byte);
        if let Err(errno) = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range)) {
            tracing::warn!(byte, %errno, "lock byte not given back");
        }
    }

    fn is_held_elsewhere(&self, byte: i64) -> Result<bool> {
        let mut range = one_byte(libc::F_WRLCK, byte);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut range))
            .map_err(|errno| Error::sys(errno, format!("Failed to test lock byte {byte}")))?;
        Ok(i32::from(range.l_type) != libc::F_UNLCK)
    }
}

fn in_use(message: String) -> Error {
    Error::new(ErrorKind::InUse, message)
}

/// The number of a permission's bit.
fn index(flag: Permission) -> i64 {
    i64::from(flag.bits().trailing_zeros())
}

fn one_byte(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

//! Permissions of a file node: lock bytes, and whether the file is open for writing.

use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{Permission, Permissions};
use crate::error::Result;

use super::alignment::Alignment;
use super::descriptor::{Access, Descriptor};
use super::{File, open};

/// What [`File::prepare_access`] has got ready.
pub(super) struct Prepared {
    users: Permissions,
    reopened: Option<(Rc<Descriptor>, Alignment)>,
}

impl File {
    /// Takes the locks that `users` calls for beside those held, and opens the file anew if its
    /// access does not fit. Blocks for an open(2) of a file that is open already.
    pub(super) fn prepare_access(&self, users: Permissions, writable: bool) -> Result<()> {
        if let Some(lock) = &self.lock {
            lock.prepare(users)?;
        }
        match self.reopen_for(users, writable) {
            Ok(reopened) => {
                *self.prepared.borrow_mut() = Some(Prepared { users, reopened });
                Ok(())
            }
            Err(error) => {
                if let Some(lock) = &self.lock {
                    lock.abort();
                }
                Err(error)
            }
        }
    }

    pub(super) fn commit_access(&self) {
        let Some(prepared) = self.prepared.take() else {
            unreachable!("permissions of '{}' were not prepared", self.filename)
        };
        if let Some((descriptor, alignment)) = prepared.reopened {
            self.descriptor.replace(descriptor);
            self.alignment.set(alignment);
        }
        if let Some(lock) = &self.lock {
            lock.commit(prepared.users);
        }
    }

    pub(super) fn abort_access(&self) {
        self.prepared.take();
        if let Some(lock) = &self.lock {
            lock.abort();
        }
    }

    fn reopen_for(
        &self,
        users: Permissions,
        writable: bool,
    ) -> Result<Option<(Rc<Descriptor>, Alignment)>> {
        let wanted = Access {
            writable: opens_for_writing(users, writable, self.auto_read_only.get()),
            direct: self.direct.get(),
        };
        let current = self.descriptor();
        if current.access() == wanted {
            return Ok(None);
        }
        let descriptor = current
            .again(&self.handle, wanted)
            .map_err(|errno| open::failed(&self.filename, refusal(errno)))?;
        let alignment = if wanted.direct {
            Alignment::of_direct(&descriptor.shared(), self.device)
        } else {
            open::cached_alignment(&descriptor.shared(), self.device)
        };
        Ok(Some((Rc::new(descriptor), alignment)))
    }
}

/// Whether a file is open for writing, given who uses it.
pub(super) fn opens_for_writing(users: Permissions, writable: bool, auto: bool) -> bool {
    let write = Permission::WRITE | Permission::WRITE_UNCHANGED | Permission::RESIZE;
    writable && (!auto || users.required.intersects(write))
}

/// A read-only file system is told like a missing permission.
pub(super) fn refusal(errno: Errno) -> Errno {
    match errno {
        Errno::EROFS => Errno::EACCES,
        other => other,
    }
}

//! A new, empty file for an image.

use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{fsync, unlink};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Handle;

use super::descriptor::Identity;
use super::device::DeviceKind;

/// A file that [`create`] has seen to.
#[derive(Clone, Debug)]
pub struct Created {
    /// Its path.
    pub filename: String,
    /// Which file it is.
    pub identity: Identity,
    /// It was not there before.
    pub is_new: bool,
}

impl Created {
    /// Removes the file again if it was not there before and is still the one that was made.
    pub async fn undo(self, handle: &Handle) {
        let removed = handle.blocking(move || self.undo_blocking()).await;
        if let Err(errno) = removed {
            tracing::warn!(%errno, "new file not removed after a failure");
        }
    }

    fn undo_blocking(self) -> Result<(), Errno> {
        if self.is_new && Identity::of_path(&self.filename)? == self.identity {
            unlink(self.filename.as_str())?;
        }
        Ok(())
    }

    /// Makes the file's name durable.
    ///
    /// # Errors
    /// What syncing its directory says.
    pub async fn sync_directory(&self, handle: &Handle) -> Result<()> {
        let path = self.filename.clone();
        let synced = handle.blocking(move || sync_directory_of(&path)).await;
        synced.map_err(|errno| Error::sys(errno, format!("Could not create '{}'", self.filename)))
    }
}

/// Makes sure that there is a regular file of this name. What is there is left as it is: it may be
/// in use, which whoever truncates it learns from its locks.
///
/// # Errors
/// `Could not create 'NAME': REASON`, or it is not a regular file.
pub async fn create(handle: &Handle, filename: &str) -> Result<Created> {
    let name = filename.to_owned();
    handle.blocking(move || create_blocking(name)).await
}

fn create_blocking(filename: String) -> Result<Created> {
    let failed = |errno| Error::sys(errno, format!("Could not create '{filename}'"));
    let access = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let exclusive = access | OFlag::O_CREAT | OFlag::O_EXCL;
    let mode = Mode::from_bits_truncate(0o644);
    let (file, is_new) = match open(filename.as_str(), exclusive, mode) {
        Ok(file) => (file, true),
        Err(Errno::EEXIST) => {
            let file = open(filename.as_str(), access, Mode::empty()).map_err(failed)?;
            (file, false)
        }
        Err(errno) => return Err(failed(errno)),
    };
    let status = fstat(&file).map_err(failed)?;
    if DeviceKind::of(&status) != DeviceKind::File {
        let text = format!("Could not create '{filename}': not a regular file");
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    Ok(Created {
        identity: Identity::of(&status),
        filename,
        is_new,
    })
}

fn sync_directory_of(path: &str) -> Result<(), Errno> {
    let parent = Path::new(path)
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    match fsync(&directory) {
        // Some file systems have nothing to sync there.
        Err(Errno::EINVAL | Errno::EROFS) => Ok(()),
        result => result,
    }
}

//! The state directory: a file for each image whose bitmaps cannot be in the image itself.
//!
//! A file is named by a digest of the image's canonical path, or of a device's lasting name, and of the part of it
//! that the node shows. Whether it is the same image is for its content to say ([`Shelf::identity`]).

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{ErrorKind as IoKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};
use sha2::{Digest, Sha256};

use crate::block::{IoFuture, Shelf};
use crate::error::{Error, ErrorKind, Result};
use crate::format::raw::RawOptions;
use crate::protocol::file::{File as ImageFile, Identity};
use crate::runtime::Handle;

/// Most bytes that are read: more than any file of ours has.
const MOST_BYTES: u64 = 1 << 30;

/// The files of one image in the state directory.
pub(super) struct StateFile {
    handle: Handle,
    inner: Arc<Inner>,
}

struct Inner {
    directory: PathBuf,
    /// The image, as it can be opened.
    image: PathBuf,
    /// Which image it was when it was opened: another one may have its name by now.
    identity: String,
    name: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lock: Option<Flock<File>>,
    /// What is in place.
    file: Option<File>,
    draft: Option<Draft>,
}

struct Draft {
    file: File,
    is_durable: bool,
}

impl StateFile {
    /// For a part of the image of this name.
    ///
    /// # Errors
    /// The image has no name any more.
    pub(super) async fn of(
        handle: &Handle,
        directory: &Path,
        image: &ImageFile,
        part: RawOptions,
    ) -> Result<StateFile> {
        let (directory, name) = (directory.to_owned(), PathBuf::from(image.filename()));
        let opened = image.identity()?;
        let inner = handle.blocking(move || {
            let inner = Inner::of(directory, &name, part)?;
            match Identity::of_path(&inner.image.to_string_lossy()) {
                Ok(there) if there == opened => Ok(inner),
                _ => {
                    let message = format!("'{}' is another file now", name.display());
                    Err(Error::new(ErrorKind::NotFound, message))
                }
            }
        });
        Ok(StateFile {
            handle: handle.clone(),
            inner: Arc::new(inner.await?),
        })
    }

    /// Does something with the files off this thread; steps do not overtake each other.
    fn step<T: Send + 'static>(
        &self,
        what: impl FnOnce(&Inner, &mut State) -> std::io::Result<T> + Send + 'static,
    ) -> IoFuture<'_, T> {
        let inner = self.inner.clone();
        let done = self.handle.blocking(move || {
            let mut state = inner.state();
            what(&inner, &mut state).map_err(|error| inner.failed(&error))
        });
        Box::pin(done)
    }
}

impl Inner {
    fn of(directory: PathBuf, image: &Path, part: RawOptions) -> Result<Inner> {
        let failed = |error: std::io::Error| {
            Error::sys(
                errno_of(&error),
                format!("Could not find '{}'", image.display()),
            )
        };
        let image = fs::canonicalize(image).map_err(failed)?;
        let status = fs::metadata(&image).map_err(failed)?;
        let lasting = match status.file_type().is_block_device() {
            true => device_name(&image, status.rdev()),
            false => format!("file {}", image.display()),
        };
        let mut digest = Sha256::new();
        digest.update(format!("{lasting}\n{}\n{:?}", part.offset, part.size));
        let digest = digest.finalize();
        let name: String = digest[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Inner {
            identity: identity_of(&status, &lasting),
            directory,
            image,
            name,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, kind: &str) -> PathBuf {
        self.directory.join(format!("{}.{kind}", self.name))
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        let directory = self.directory.display();
        Error::sys(
            errno_of(error),
            format!("Could not use the state directory '{directory}' (option --state-dir)"),
        )
    }

    /// The directory above it must be there.
    fn lock(&self) -> Result<Flock<File>> {
        let failed = |error: std::io::Error| self.failed(&error);
        match fs::DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != IoKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let file = new_file()
            .create(true)
            .truncate(false)
            .open(self.path("lock"))
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) => {
                let image = self.image.display();
                let message = format!("The bitmaps of '{image}' are in use by another process");
                Err(Error::new(ErrorKind::InUse, message))
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    fn stamp(&self) -> std::io::Result<String> {
        let status = fs::metadata(&self.image)?;
        if status.file_type().is_block_device() {
            return Ok(String::new());
        }
        Ok(format!(
            "{} {}.{} {}.{}",
            status.size(),
            status.mtime(),
            status.mtime_nsec(),
            status.ctime(),
            status.ctime_nsec()
        ))
    }
}

impl Shelf for StateFile {
    fn name(&self) -> String {
        self.inner.path("bitmaps").display().to_string()
    }

    fn identity(&self) -> IoFuture<'_, String> {
        Box::pin(async { Ok(self.inner.identity.clone()) })
    }

    fn stamp(&self) -> IoFuture<'_, String> {
        self.step(|inner, _| inner.stamp())
    }

    fn lock(&self) -> IoFuture<'_, ()> {
        let inner = self.inner.clone();
        Box::pin(self.handle.blocking(move || {
            let lock = inner.lock()?;
            inner.state().lock = Some(lock);
            Ok(())
        }))
    }

    fn unlock(&self) {
        self.inner.state().lock = None;
    }

    fn read(&self) -> IoFuture<'_, Option<Vec<u8>>> {
        self.step(|inner, state| {
            let path = inner.path("bitmaps");
            let mut file = match new_file().open(&path) {
                Err(error) if is_absent(&error) => return Ok(None),
                // Without a right to write it can be read.
                Err(error) if is_refused(&error) => File::open(&path)?,
                file => file?,
            };
            let mut bytes = Vec::new();
            file.by_ref().take(MOST_BYTES).read_to_end(&mut bytes)?;
            state.file = Some(file);
            Ok(Some(bytes))
        })
    }

    fn write_draft(&self, bytes: Vec<u8>) -> IoFuture<'_, ()> {
        self.step(move |inner, state| {
            state.draft = None;
            let path = inner.path("draft");
            match fs::remove_file(&path) {
                Err(error) if error.kind() != IoKind::NotFound => return Err(error),
                _ => {}
            }
            let file = new_file().create_new(true).open(&path)?;
            file.write_all_at(&bytes, 0)?;
            state.draft = Some(Draft {
                file,
                is_durable: false,
            });
            Ok(())
        })
    }

    fn sync_draft(&self) -> IoFuture<'_, ()> {
        self.step(|_, state| {
            let draft = state.draft.as_mut().ok_or(Errno::ENOENT)?;
            draft.file.sync_all()?;
            draft.is_durable = true;
            Ok(())
        })
    }

    fn put_draft(&self) -> IoFuture<'_, ()> {
        self.step(|inner, state| {
            // One that came after a step that nobody waited for is not taken half done.
            let draft = state.draft.take().filter(|draft| draft.is_durable);
            let draft = draft.ok_or(Errno::ENOENT)?;
            fs::rename(inner.path("draft"), inner.path("bitmaps"))?;
            state.file = Some(draft.file);
            Ok(())
        })
    }

    fn remove(&self) -> IoFuture<'_, ()> {
        self.step(|inner, state| {
            state.file = None;
            match fs::remove_file(inner.path("bitmaps")) {
                Err(error) if error.kind() != IoKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
    }

    fn sync_names(&self) -> IoFuture<'_, ()> {
        self.step(|inner, _| File::open(&inner.directory)?.sync_all())
    }

    fn write_at(&self, offset: u64, bytes: Vec<u8>) -> IoFuture<'_, ()> {
        self.step(move |_, state| {
            let file = state.file.as_ref().ok_or(Errno::ENOENT)?;
            file.write_all_at(&bytes, offset)
        })
    }

    fn sync(&self) -> IoFuture<'_, ()> {
        self.step(|_, state| {
            let file = state.file.as_ref().ok_or(Errno::ENOENT)?;
            nix::unistd::fdatasync(file.as_fd()).map_err(Into::into)
        })
    }
}

/// Of the file or device that has this name for good.
fn identity_of(status: &Metadata, lasting: &str) -> String {
    if status.file_type().is_block_device() {
        return format!("{lasting}{}", incarnation(lasting, status.rdev()));
    }
    let created = match status.created() {
        Ok(time) => format!("{time:?}"),
        Err(_) => format!("device {}", status.dev()),
    };
    format!("{lasting} inode {} {created}", status.ino())
}

/// Readable and writable for us alone, closed in programs that are started.
fn new_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), IoKind::NotFound | IoKind::NotADirectory)
}

fn is_refused(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        IoKind::PermissionDenied | IoKind::ReadOnlyFilesystem
    )
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// A name that a device keeps when it gets another number: of several the first. Without one, its number.
fn device_name(image: &Path, number: u64) -> String {
    let names = fs::read_dir("/dev/disk/by-id")
        .into_iter()
        .flatten()
        .flatten();
    let is_it = |path: &PathBuf| fs::canonicalize(path).is_ok_and(|device| device == image);
    let first = names.map(|entry| entry.path()).filter(is_it).min();
    match first {
        Some(path) => format!("device {}", path.display()),
        None => format!("device {}:{}", major(number), minor(number)),
    }
}

/// A number may be another disk's after the next boot, or as soon as another one is attached there.
fn incarnation(lasting: &str, number: u64) -> String {
    if lasting.contains("/by-id/") {
        return String::new();
    }
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let boot = read("/proc/sys/kernel/random/boot_id".to_owned());
    let sequence = format!("/sys/dev/block/{}:{}/diskseq", major(number), minor(number));
    format!(" boot {} disk {}", boot.trim(), read(sequence).trim())
}

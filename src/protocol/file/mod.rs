//! Files and host devices: the leaf that does I/O through the thread's ring.
//!
//! One driver serves `file` (regular files) and `host_device` (block and character devices). A read
//! or write is one boxed future around one submission to the ring; only a short transfer costs more.
//!
//! Invariants:
//! - The lock bytes in the file say what the node's users need and share, from before the first
//!   request until the node is closed.
//! - The descriptor is open for writing exactly while somebody may write (with `auto-read-only`), or
//!   while the node is not read-only (without).
//! - After a failed flush of cached data no later flush succeeds: the kernel has dropped the pages.

mod access;
mod alignment;
mod allocation;
mod create;
mod descriptor;
mod device;
mod from_file;
mod lock;
mod open;
mod transfer;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{
    Driver, Extent, IoFuture, Limits, Permissions, Role, TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::{FileSlice, Payload, SourceFile};
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;
use crate::runtime::ring::FsyncKind;

use access::Prepared;
use alignment::Alignment;
use descriptor::Descriptor;
use device::DeviceKind;
use lock::ImageLock;

pub use create::{Created, create};
pub use descriptor::Identity;

/// Which driver a node was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// `file`: regular files only.
    Regular,
    /// `host_device`: block and character devices only.
    Device,
}

impl FileKind {
    /// The driver's name.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Regular => "file",
            FileKind::Device => "host_device",
        }
    }
}

/// What a file is opened with.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Path, literally.
    pub filename: String,
    /// Which driver.
    pub kind: FileKind,
    /// The node is not read-only.
    pub writable: bool,
    /// Open for writing only while somebody writes.
    pub auto_read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Flushes and FUA are not wanted.
    pub no_flush: bool,
    /// Take and honour the lock bytes of other processes.
    pub locking: bool,
}

/// What was discarded, for statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscardStatistics {
    /// Requests that succeeded.
    pub succeeded: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// The driver behind `file` and `host_device` nodes.
pub struct File {
    handle: Handle,
    filename: String,
    kind: FileKind,
    device: DeviceKind,
    descriptor: RefCell<Rc<Descriptor>>,
    lock: Option<ImageLock>,
    prepared: RefCell<Option<Prepared>>,
    auto_read_only: Cell<bool>,
    direct: Cell<bool>,
    no_flush: Cell<bool>,
    alignment: Cell<Alignment>,
    block_size: u32,
    /// Bytes up to the end of the file, as far as this node knows.
    length: Cell<u64>,
    /// Changes so far, and how many of them a flush has made durable.
    changes: Cell<u64>,
    synced_changes: Cell<u64>,
    lost_writes: Cell<Option<Errno>>,
    zero_range: Cell<bool>,
    /// Blocks may be shared with other files, as far as is known.
    clones: Cell<bool>,
    discards: Cell<DiscardStatistics>,
}

impl File {
    /// Opens the file. Locks are taken when the node is put into the graph, before any request.
    ///
    /// # Errors
    /// With QEMU's text and the system call's errno: cannot be opened, is not of the kind asked for.
    pub async fn open(handle: &Handle, options: FileOptions) -> Result<File> {
        open::open(handle, options).await
    }

    /// Path as it was given.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// Which file it is, whatever its names.
    pub fn identity(&self) -> Result<Identity> {
        self.descriptor().identity()
    }

    /// Bytes that the file takes up in its file system.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.descriptor().allocated_bytes()
    }

    /// What was discarded since the node was opened.
    pub fn discards(&self) -> DiscardStatistics {
        self.discards.get()
    }

    /// Other cache and read-only options; they hold when permissions are refreshed next.
    pub fn set_options(&self, auto_read_only: bool, direct: bool, no_flush: bool) {
        self.auto_read_only.set(auto_read_only);
        self.direct.set(direct);
        self.no_flush.set(no_flush);
    }

    fn descriptor(&self) -> Rc<Descriptor> {
        self.descriptor.borrow().clone()
    }

    /// Bytes up to `end` were written or zeroed.
    fn written_to(&self, end: u64) {
        self.count_change();
        if self.device == DeviceKind::File && end > self.length.get() {
            self.length.set(end);
        }
    }

    fn count_change(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    /// Of a regular file, and not past its end.
    fn slice_of(&self, range: ByteRange) -> Option<FileSlice> {
        if self.device != DeviceKind::File || range.end() > self.length.get() {
            return None;
        }
        let descriptor = self.descriptor();
        let source = SourceFile {
            descriptor: descriptor.shared(),
            alignment: self.alignment.get().request,
            direct: descriptor.access().direct,
            device: descriptor.device(),
            name: self.filename.clone(),
        };
        Some(FileSlice::new(source, range))
    }

    async fn sync(&self) -> Result<()> {
        if let Some(errno) = self.lost_writes.get() {
            let message = format!("an earlier flush of '{}' failed", self.filename);
            return Err(Error::sys(errno, message));
        }
        let changes = self.changes.get();
        if self.no_flush.get() || changes == self.synced_changes.get() {
            return Ok(());
        }
        let file = self.descriptor().ring_file();
        let result = self.handle.ring().fsync(&file, FsyncKind::Data).await;
        match &result {
            Ok(()) => self.synced_changes.set(changes),
            Err(error) if !self.direct.get() => self.lost_writes.set(Some(error.errno())),
            Err(_) => {}
        }
        result.map_err(|error| error.context(format!("flush of '{}'", self.filename)))
    }

    async fn resize(&self, size: u64, options: TruncateOptions) -> Result<()> {
        if self.device != DeviceKind::File {
            return self.resize_device(size, options);
        }
        let shared = self.descriptor().shared();
        let result = self
            .handle
            .blocking(move || descriptor::truncate(&shared, size));
        result
            .await
            .map_err(|errno| Error::sys(errno, "Failed to resize the file"))?;
        self.length.set(size);
        self.count_change();
        Ok(())
    }

    fn resize_device(&self, size: u64, options: TruncateOptions) -> Result<()> {
        let text = if options.exact && size != self.length.get() {
            "Cannot resize device files"
        } else if size > self.length.get() {
            "Cannot grow device files"
        } else {
            return Ok(());
        };
        Err(Error::from_errno(Errno::ENOTSUP, text))
    }
}

/// Sizes of nodes are multiples of this; a longer tail of the file reads as zeroes.
const SECTOR: u64 = 512;

impl Driver for File {
    fn driver_name(&self) -> &'static str {
        self.kind.name()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.length.get().next_multiple_of(SECTOR)
    }

    fn limits(&self) -> Limits {
        let alignment = self.alignment.get();
        Limits {
            request_alignment: alignment.request,
            logical_block_size: alignment.request,
            memory_alignment: alignment.memory,
            discard_granularity: self.block_size,
            native_fua: true,
            ..Limits::default()
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.read_all(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        match payload {
            Payload::File(slice) => Box::pin(self.write_slice(offset, slice, flags)),
            payload => Box::pin(self.write_all(offset, payload, flags)),
        }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(self.zero(range, flags))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(self.give_back(range))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.sync())
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(self.status(range))
    }

    fn file_slice(&self, range: ByteRange) -> Option<FileSlice> {
        self.slice_of(range)
    }

    fn writes_file(&self, slice: &FileSlice) -> bool {
        self.gains_by(slice)
    }

    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(self.resize(size, options))
    }

    fn child_permissions(&self, role: Role, _users: Permissions, _writable: bool) -> Permissions {
        unreachable!("a file has no {} child", role.name())
    }

    fn prepare_permissions(&self, users: Permissions, writable: bool) -> Result<()> {
        self.prepare_access(users, writable)
    }

    fn commit_permissions(&self) {
        self.commit_access();
    }

    fn abort_permissions(&self) {
        self.abort_access();
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            let result = self.sync().await;
            if let Some(lock) = &self.lock {
                lock.release();
            }
            result
        })
    }
}

#[cfg(test)]
mod from_file_tests;
#[cfg(test)]
mod tests;

//! `raw`: the bytes of a file, or of a part of it, as they are. Persistent bitmaps are kept beside it (`bitmaps`).

mod bitmaps;
mod parse;
mod stored;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{
    BitmapStore, Child, DebugEvent, Driver, Extent, ExtentKind, Forward, IoFuture, Limits, Node,
    Permission, Permissions, Role, Transfer, TransferKind, TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use bitmaps::Beside;

pub use bitmaps::BesideOptions;

/// Which part of the file the node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// First byte.
    pub offset: u64,
    /// Bytes, a multiple of 512; up to the end of the file where it is not given.
    pub size: Option<u64>,
}

impl RawOptions {
    /// The whole file.
    pub fn is_whole(&self) -> bool {
        *self == RawOptions::default()
    }

    fn check(&self, containing: u64) -> Result<()> {
        let offset = self.offset;
        if offset > containing {
            return Err(invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({containing})"
            )));
        }
        let Some(size) = self.size else { return Ok(()) };
        if containing - offset < size {
            return Err(invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
                 actual size of the containing file ({containing})"
            )));
        }
        if size % 512 != 0 {
            return Err(invalid("Specified size is not multiple of 512"));
        }
        Ok(())
    }
}

/// The driver.
pub struct Raw {
    file: RefCell<Rc<Child>>,
    options: Cell<RawOptions>,
    /// Where bitmaps are kept, if they can be.
    beside: Option<Beside>,
}

impl Raw {
    /// The permissions with which `file` is to be attached before the node is there.
    pub fn file_permissions(options: &RawOptions) -> Permissions {
        child_permissions(options, Permissions::NONE)
    }

    /// A node over the part of `file` that the options name.
    ///
    /// # Errors
    /// The part is not inside the file, or its size not a multiple of 512.
    pub fn open(file: Rc<Child>, options: RawOptions) -> Result<Raw> {
        options.check(file.node().size())?;
        Ok(Raw {
            file: RefCell::new(file),
            options: Cell::new(options),
            beside: None,
        })
    }

    /// With the bitmaps that are kept beside the image; where it is writable they are in use from now on.
    ///
    /// # Errors
    /// What is stored is damaged, or somebody else uses it.
    pub async fn with_bitmaps(mut self, options: BesideOptions) -> Result<Raw> {
        let beside = Beside::new(options);
        beside.load(&self.file(), self.part_size()).await?;
        self.beside = Some(beside);
        Ok(self)
    }

    /// Which part of the file it is.
    pub fn options(&self) -> RawOptions {
        self.options.get()
    }

    /// Another part of the file. In a drained section.
    ///
    /// # Errors
    /// As [`Raw::open`]; nothing has changed.
    pub fn set_options(&self, options: RawOptions) -> Result<()> {
        options.check(self.file().node().size())?;
        if options != self.options.get() {
            self.check_no_bitmaps()?;
        }
        self.options.set(options);
        Ok(())
    }

    fn file(&self) -> Rc<Child> {
        self.file.borrow().clone()
    }

    fn part_size(&self) -> u64 {
        let options = self.options.get();
        let containing = self.file.borrow().node().size();
        options
            .size
            .unwrap_or(containing.saturating_sub(options.offset))
    }

    fn beside(&self) -> &Beside {
        match &self.beside {
            Some(beside) => beside,
            None => unreachable!("a raw node without a place for bitmaps has none that are stored"),
        }
    }

    /// Stored bitmaps are those of one part of one file.
    fn check_no_bitmaps(&self) -> Result<()> {
        let stored = self.beside.as_ref().map(Beside::persistent);
        if stored.is_none_or(|bitmaps| bitmaps.is_empty()) {
            return Ok(());
        }
        let message =
            "Cannot show another file or another part of it: the node has persistent bitmaps";
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    async fn resize(&self, size: u64, options: TruncateOptions) -> Result<()> {
        let (file, part, before) = (self.file(), self.options.get(), self.part_size());
        if part.size.is_some() {
            let message = "Cannot resize fixed-size raw disks";
            return Err(Error::from_errno(Errno::ENOTSUP, message));
        }
        let Some(end) = size.checked_add(part.offset) else {
            let message = "Disk size too large for the chosen offset";
            return Err(Error::from_errno(Errno::EINVAL, message));
        };
        let Some(beside) = &self.beside else {
            return file.truncate(end, options).await;
        };
        beside.prepare_resize(&file, before, size).await?;
        let resized = file.truncate(end, options).await;
        beside.resized(&file, self.part_size()).await;
        resized
    }

    fn in_file(&self, range: ByteRange) -> ByteRange {
        let start = self.options.get().offset + range.start();
        ByteRange::between(start, start + range.length())
    }
}

fn child_permissions(options: &RawOptions, users: Permissions) -> Permissions {
    if options.is_whole() {
        return users.for_filter();
    }
    let mut required = users.required;
    if options.size.is_some() {
        required -= Permission::RESIZE;
    }
    Permissions {
        required: required | Permission::CONSISTENT_READ,
        shared: users.shared - Permission::RESIZE,
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

impl Driver for Raw {
    fn driver_name(&self) -> &'static str {
        "raw"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.part_size()
    }

    fn cluster_size(&self) -> Option<u64> {
        self.file.borrow().node().driver().cluster_size()
    }

    fn limits(&self) -> Limits {
        let below = self.file.borrow().node().driver().limits();
        let offset = self.options.get().offset;
        let aligned = offset.is_multiple_of(u64::from(below.logical_block_size));
        Limits {
            // The edge below pads: it also sees the writes that go past this node.
            request_alignment: 1,
            logical_block_size: if aligned { below.logical_block_size } else { 1 },
            ..below
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        let offset = self.options.get().offset + offset;
        let file = self.file();
        file.debug_event(DebugEvent::ReadAio);
        Box::pin(async move { file.read(offset, payload).await })
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let offset = self.options.get().offset + offset;
        let file = self.file();
        file.debug_event(DebugEvent::WriteAio);
        Box::pin(async move { file.write(offset, payload, flags).await })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        let range = self.in_file(range);
        let file = self.file();
        Box::pin(async move { file.write_zeroes(range, flags).await })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        let range = self.in_file(range);
        let file = self.file();
        Box::pin(async move { file.discard(range).await })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let file = self.file();
        Box::pin(async move { file.flush().await })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        let range = self.in_file(range);
        let file = self.file();
        Box::pin(async move {
            let extent = file.block_status(range).await?;
            Ok(Extent {
                length: extent.length,
                kind: located_at(extent.kind, range.start()),
            })
        })
    }

    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(self.resize(size, options))
    }

    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let child = self.file();
        child.debug_event(match transfer.kind {
            TransferKind::Read => DebugEvent::ReadAio,
            TransferKind::Write(_) => DebugEvent::WriteAio,
        });
        Some(Forward {
            child,
            offset: self.options.get().offset + transfer.offset,
            guard: None,
        })
    }

    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        assert!(role == Role::File, "raw has no {} child", role.name());
        child_permissions(&self.options.get(), users)
    }

    fn set_file(&self, file: Rc<Child>) -> Result<()> {
        self.options.get().check(file.node().size())?;
        if !Rc::ptr_eq(&lowest(&file.node()), &lowest(&self.file().node())) {
            self.check_no_bitmaps()?;
            if let Some(beside) = &self.beside {
                beside.give_up();
            }
        }
        self.file.replace(file);
        Ok(())
    }

    fn set_read_only(&self, read_only: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let (file, size) = (self.file(), self.part_size());
            match (&self.beside, read_only) {
                (Some(beside), true) => beside.end(&file, size).await,
                (Some(beside), false) => beside.begin(&file, size).await,
                (None, _) => Ok(()),
            }
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            let file = self.file();
            let ended = match &self.beside {
                Some(beside) => beside.end(&file, self.part_size()).await,
                None => Ok(()),
            };
            file.flush().await.and(ended)
        })
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        match &self.beside {
            Some(_) => Some(self),
            None => None,
        }
    }
}

/// What the node stores everything in.
fn lowest(node: &Rc<Node>) -> Rc<Node> {
    let mut lowest = node.clone();
    while let Some(edge) = lowest.storage() {
        lowest = edge.node();
    }
    lowest
}

/// A protocol node says what a range is; here that is where it lies in the file.
fn located_at(kind: ExtentKind, offset: u64) -> ExtentKind {
    match kind {
        ExtentKind::Data { .. } => ExtentKind::Data {
            host_offset: Some(offset),
            compressed: false,
        },
        ExtentKind::Zero { .. } => ExtentKind::Zero {
            host_offset: Some(offset),
        },
        ExtentKind::Unallocated => ExtentKind::Unallocated,
    }
}

#[cfg(test)]
mod tests;

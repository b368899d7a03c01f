//! What a node does: the interface of protocol, format and filter drivers.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bitflags::bitflags;

use crate::buffer::{FileSlice, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::{BitmapStore, Child, DebugEvent, Extent, Limits, Permissions, RangeGuard, Role};

/// The future of a request to a driver. A dropped future does not stop I/O that has begun.
pub type IoFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

bitflags! {
    /// Flags of a write.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: u32 {
        /// Durable when answered, as is the metadata that finds it.
        const FUA = 1;
        /// Stored compressed where the driver can, and the request covers whole clusters of it.
        const COMPRESSED = 2;
    }

    /// Flags of a write-zeroes request.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ZeroFlags: u32 {
        /// Durable when answered.
        const FUA = 1;
        /// Space may be given back; without it the range stays allocated.
        const MAY_UNMAP = 2;
        /// Fail with `EOPNOTSUPP` rather than write zeroes as data.
        const NO_FALLBACK = 4;
    }
}

/// How a node is made longer or shorter.
#[derive(Clone, Copy, Debug, Default)]
pub struct TruncateOptions {
    /// The new end must be exact; otherwise a protocol node may keep a larger size.
    pub exact: bool,
    /// The new area must read as zeroes even where a longer backing file has data.
    pub zero_new: bool,
}

/// Direction of a [`Transfer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferKind {
    /// Node to payload.
    Read,
    /// Payload to node.
    Write(WriteFlags),
}

/// A data request without its payload, for [`Driver::forward`].
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Direction and flags.
    pub kind: TransferKind,
    /// First byte.
    pub offset: u64,
    /// Bytes; not 0.
    pub length: u64,
}

impl Transfer {
    /// The bytes it covers. Edges have checked that it does not wrap.
    pub fn range(&self) -> ByteRange {
        ByteRange::between(self.offset, self.offset + self.length)
    }
}

/// Where a transfer goes on, unchanged but for its offset.
pub struct Forward {
    /// The edge it crosses next.
    pub child: Rc<Child>,
    /// Its first byte there.
    pub offset: u64,
    /// Held until the transfer is over.
    pub guard: Option<TransferGuard>,
}

/// What a driver holds on to while a transfer that it forwarded is on its way.
pub enum TransferGuard {
    /// The driver counts it.
    Counted(InFlight),
    /// Bytes that it locked.
    Locked(RangeGuard),
}

/// Counts a request for as long as it lives.
pub struct InFlight(Rc<Cell<u32>>);

impl InFlight {
    /// One more in `counter`, until dropped.
    pub fn enter(counter: &Rc<Cell<u32>>) -> InFlight {
        counter.set(counter.get() + 1);
        InFlight(counter.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A protocol, format or filter driver behind a node.
///
/// Callers are [`Child`] edges: data requests lie within the node (or grow it, where the edge may
/// resize), are not empty, and keep the driver's [`Limits`]. Several requests are in flight at a time,
/// in any order; overlapping ones have no order but what the driver gives them.
pub trait Driver: Any {
    /// The driver's name on the command line: `qcow2`, `file`.
    fn driver_name(&self) -> &'static str;

    /// For downcasts by who knows the driver (`blockdev`, for its own options).
    fn as_any(&self) -> &dyn Any;

    /// Bytes in the node.
    fn size(&self) -> u64;

    /// What one request may be. May change when children change.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Fills the payload from `offset`. Bytes past the end of a protocol node read as zeroes.
    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()>;

    /// Writes the payload at `offset`.
    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()>;

    /// Makes the range read as zeroes. `EOPNOTSUPP` lets the edge fall back to writing zeroes.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()>;

    /// A hint that the range's content is not needed. Must never reveal a backing file's data.
    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()>;

    /// Makes every write that was answered before durable, with the metadata that finds it.
    fn flush(&self) -> IoFuture<'_, ()>;

    /// What the first extent of the range is, in this layer only. At least one byte long.
    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent>;

    /// The bytes of a range as the payload of a write elsewhere, where they lie in a file and can be
    /// read from it without this node.
    fn file_slice(&self, range: ByteRange) -> Option<FileSlice> {
        let _ = range;
        None
    }

    /// A write of these bytes of another file is carried out here, off this thread, and is cheaper than
    /// reading them and writing them as memory.
    fn writes_file(&self, slice: &FileSlice) -> bool {
        let _ = slice;
        false
    }

    /// Bytes in a cluster, a power of two, of a format that has clusters, also of one that is shown as it is.
    fn cluster_size(&self) -> Option<u64> {
        None
    }

    /// Writes may be [`WriteFlags::COMPRESSED`].
    fn compresses(&self) -> bool {
        false
    }

    /// Sets the size in bytes.
    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        let _ = (size, options);
        Box::pin(async move {
            Err(Error::new(
                ErrorKind::Unsupported,
                "Image format driver does not support resize",
            ))
        })
    }

    /// The fast path: where this transfer goes on unchanged, if that is known without waiting.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let _ = transfer;
        None
    }

    /// Permissions that the node needs on, and shares with other users of, a child in this role, given
    /// what its own users need and share. `writable`: the node was not opened read-only.
    fn child_permissions(&self, role: Role, users: Permissions, writable: bool) -> Permissions;

    /// Gets ready for these cumulative permissions (locks, reopening for write), or fails changing
    /// nothing. Followed by [`Driver::commit_permissions`] or [`Driver::abort_permissions`].
    fn prepare_permissions(&self, users: Permissions, writable: bool) -> Result<()> {
        let _ = (users, writable);
        Ok(())
    }

    /// What was prepared holds from now on.
    fn commit_permissions(&self) {}

    /// What was prepared is given back.
    fn abort_permissions(&self) {}

    /// While this holds no request may wait in the driver for time to pass: a drained section waits for
    /// it. Calls nest.
    fn set_hurried(&self, hurried: bool) {
        let _ = hurried;
    }

    /// Whoever has this node as its file is about to do something there.
    fn debug_event(&self, event: DebugEvent) {
        let _ = event;
    }

    /// Nobody above writes any more: the last who did goes or turns read-only. The node still may.
    fn writers_gone(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Stops work that the driver does by itself and waits for it to end; until [`Driver::drain_end`].
    fn drain_begin(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// The driver may work by itself again.
    fn drain_end(&self) {}

    /// The backing edge of the node was put in, replaced or taken away. Formats with a backing file
    /// implement it; inside a drained section.
    fn set_backing(&self, backing: Option<Rc<Child>>) -> Result<()> {
        let _ = backing;
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "Driver '{}' does not support backing files",
                self.driver_name()
            ),
        ))
    }

    /// The `file` edge of the node was replaced (a filter put in or taken out); in a drained section.
    fn set_file(&self, file: Rc<Child>) -> Result<()> {
        let _ = file;
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "Driver '{}' cannot change its file child",
                self.driver_name()
            ),
        ))
    }

    /// Rewrites the backing reference in the image's header; durable when answered. `None` removes it.
    fn change_backing_reference<'a>(
        &'a self,
        reference: Option<(&'a str, &'a str)>,
    ) -> IoFuture<'a, ()> {
        let _ = reference;
        let name = self.driver_name();
        Box::pin(async move {
            Err(Error::new(
                ErrorKind::Unsupported,
                format!("Driver '{name}' does not support backing file changes"),
            ))
        })
    }

    /// The node turns read-only (true: everything is written out and marks are cleared before) or
    /// read-write (false: the image is ready to be written after). In a drained section.
    fn set_read_only(&self, read_only: bool) -> IoFuture<'_, ()> {
        let _ = read_only;
        Box::pin(async { Ok(()) })
    }

    /// Writes everything out and leaves the image clean. No request follows.
    fn close(&self) -> IoFuture<'_, ()>;

    /// Where the driver stores bitmaps with its image.
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }

    /// It changes its child's traffic and has no content of its own.
    fn is_filter(&self) -> bool {
        false
    }
}

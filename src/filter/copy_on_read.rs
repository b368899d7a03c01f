//! `copy-on-read`: what is read from below the child is stored in the child.
//!
//! A copy holds its clusters alone from looking at them until they are stored, a guest's write holds
//! its bytes together with other writes: a write that comes first is seen by the copy, one that comes
//! later waits and goes on top. So a copy never overwrites what a guest wrote.
//!
//! A writer beside the filter would not be seen. While anybody reads through the filter nobody else may
//! write below it, by permissions; whoever reads without that claim gets what there is, uncopied. A job sees
//! to it by itself that nobody comes to its node.

use std::any::Any;
use std::rc::Rc;

use crate::block::{
    Child, DebugEvent, Driver, Extent, Forward, IoFuture, Limits, LockMode, Node, Permission,
    Permissions, RangeGuard, RangeLock, Role, Transfer, TransferGuard, TransferKind,
    TruncateOptions, WriteFlags, ZeroFlags, status_above,
};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

/// Bytes that one copy moves at most, where clusters are not larger.
const PIECE: u64 = 1 << 20;

/// What becomes of the reads of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestReads {
    /// What they bring up from below is stored.
    Copy,
    /// They pass by: a job does the copying, and holds what it copies by [`CopyOnRead::hold`].
    PassBy,
}

/// The driver.
pub struct CopyOnRead {
    file: Rc<Child>,
    bottom: Option<Rc<Node>>,
    reads: GuestReads,
    lock: RangeLock,
}

impl CopyOnRead {
    /// Copies from the layers below the node of `file`, down to `bottom` and with it; without
    /// `bottom` from all there are.
    pub fn new(file: Rc<Child>, bottom: Option<Rc<Node>>, reads: GuestReads) -> CopyOnRead {
        CopyOnRead {
            file,
            bottom,
            reads,
            lock: RangeLock::new(),
        }
    }

    /// The edge to the node that is filled. Copies are written over it, in a range that is held.
    pub fn file(&self) -> Rc<Child> {
        self.file.clone()
    }

    /// The lowest layer whose content is copied.
    pub fn bottom(&self) -> Option<Rc<Node>> {
        self.bottom.clone()
    }

    /// Holds guests' changes and other copies off the range and the rest of its clusters. What was not
    /// stored in the child before may be by now: look again.
    pub async fn hold(&self, range: ByteRange) -> RangeGuard {
        let clusters = self.clusters(range);
        self.lock.lock(clusters, LockMode::Exclusive).await
    }

    fn clusters(&self, range: ByteRange) -> ByteRange {
        range.align_outward(u64::from(self.limits().optimal_transfer))
    }

    /// Whether the start of the range is to be copied, and for how many bytes that holds.
    async fn is_missing(&self, range: ByteRange) -> Result<(bool, u64)> {
        let below_bottom = self
            .bottom
            .as_ref()
            .and_then(|bottom| bottom.child(Role::Backing))
            .map(|edge| edge.node());
        let status = status_above(&self.file.node(), below_bottom.as_ref(), range).await?;
        Ok((status.depth > 1, status.extent.length))
    }

    /// Nobody writes below but through here.
    fn is_alone(&self) -> bool {
        !self.file.permissions().shared.contains(Permission::WRITE)
    }

    async fn read_copying(&self, offset: u64, payload: Payload) -> Result<()> {
        let end = offset + payload.length() as u64;
        let mut start = offset;
        while start < end {
            let (missing, length) = self.is_missing(ByteRange::between(start, end)).await?;
            let next = start + length;
            let piece = payload.slice((start - offset) as usize, length as usize);
            if missing {
                self.copy(ByteRange::between(start, next)).await?;
            }
            self.file.read(start, piece).await?;
            start = next;
        }
        Ok(())
    }

    /// Stores the range and the rest of its clusters in the child.
    async fn copy(&self, range: ByteRange) -> Result<()> {
        let most = PIECE.max(u64::from(self.limits().optimal_transfer));
        let clusters = self.clusters(range);
        let mut start = clusters.start();
        while start < clusters.end() {
            let piece = ByteRange::between(start, clusters.end().min(start + most));
            let _held = self.hold(piece).await;
            let end = piece.end().min(self.size());
            if end <= start {
                return Ok(());
            }
            let (missing, length) = self.is_missing(ByteRange::between(start, end)).await?;
            start += length;
            if missing {
                // A layer below may have smaller clusters.
                let whole = self.clusters(ByteRange::between(start - length, start));
                let whole = ByteRange::between(whole.start(), whole.end().min(end));
                self.store(whole).await?;
                start = whole.end();
            }
        }
        Ok(())
    }

    /// Writes what is read from the range to the same place. The range is held.
    async fn store(&self, range: ByteRange) -> Result<()> {
        let bytes = MemorySlice::zeroed(range.length() as usize);
        let file = &self.file;
        file.read(range.start(), bytes.clone().into()).await?;
        file.debug_event(DebugEvent::CorWrite);
        if bytes.is_zero() {
            return file.write_zeroes(range, ZeroFlags::empty()).await;
        }
        file.write(range.start(), bytes.into(), WriteFlags::empty())
            .await
    }

    async fn share(&self, range: ByteRange) -> RangeGuard {
        self.lock.lock(range, LockMode::Shared).await
    }
}

impl Driver for CopyOnRead {
    fn driver_name(&self) -> &'static str {
        "copy-on-read"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(file: size, limits, flush, block_status);

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        match self.reads {
            GuestReads::Copy if self.is_alone() => Box::pin(self.read_copying(offset, payload)),
            _ => Box::pin(self.file.read(offset, payload)),
        }
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        Box::pin(async move {
            let _held = self.share(range).await;
            self.file.write(offset, payload, flags).await
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _held = self.share(range).await;
            self.file.write_zeroes(range, flags).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _held = self.share(range).await;
            self.file.discard(range).await
        })
    }

    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let all = ByteRange::between(0, u64::MAX);
            let _held = self.lock.lock(all, LockMode::Exclusive).await;
            self.file.truncate(size, options).await
        })
    }

    /// Reads that pass by, and writes to what nobody copies now.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let guard = match (transfer.kind, self.reads) {
            (TransferKind::Read, GuestReads::Copy) => return None,
            (TransferKind::Read, GuestReads::PassBy) => None,
            (TransferKind::Write(_), _) => {
                let held = self.lock.try_lock(transfer.range(), LockMode::Shared)?;
                Some(TransferGuard::Locked(held))
            }
        };
        Some(Forward {
            child: self.file(),
            offset: transfer.offset,
            guard,
        })
    }

    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        assert!(
            role == Role::File,
            "copy-on-read has no {} child",
            role.name()
        );
        let mut required = users.required | Permission::WRITE_UNCHANGED;
        if self.reads == GuestReads::PassBy {
            required |= Permission::CONSISTENT_READ;
        }
        let mut shared = users.shared | Permission::WRITE_UNCHANGED;
        let copies = self.reads == GuestReads::Copy;
        if copies && users.required.contains(Permission::CONSISTENT_READ) {
            // A copy would overwrite what is written beside it.
            shared -= Permission::WRITE;
        }
        Permissions { required, shared }
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.flush()
    }
}

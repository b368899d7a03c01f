//! `mirror_top`: stands above what a job copies while a guest writes it, and sees to it that the copy
//! follows.
//!
//! In the background mode a write goes to the child only, and what it changed is marked dirty when it
//! has ended; the job clears a mark before it reads, so that a write beside the copy is copied again. In
//! the write-blocking mode a write goes to the child and to the target, alone in its range, and is
//! answered when it is in both; nothing new becomes dirty, and the job ends however much is written.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{
    Child, DirtyBitmap, Driver, Extent, Forward, IoFuture, Limits, LockMode, Permission,
    Permissions, RangeGuard, RangeLock, Role, Transfer, TransferKind, TruncateOptions, WriteFlags,
    ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

/// When the target gets a guest's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Some time after.
    #[default]
    Background,
    /// Before they are answered.
    WriteBlocking,
}

/// What the job of a [`MirrorTop`] wants to know: this many bytes have become dirty.
pub type DirtySink = Rc<dyn Fn(u64)>;

/// The driver.
pub struct MirrorTop {
    child: Rc<Child>,
    target: Rc<Child>,
    mode: Cell<CopyMode>,
    dirty: RefCell<DirtyBitmap>,
    tell: RefCell<Option<DirtySink>>,
    lock: RangeLock,
}

impl MirrorTop {
    /// Above the node of `child`, whose content goes to the node of `target`. Nothing is dirty yet.
    pub fn new(child: Rc<Child>, target: Rc<Child>, granularity: u64) -> MirrorTop {
        let size = child.node().size();
        MirrorTop {
            child,
            target,
            mode: Cell::default(),
            dirty: RefCell::new(DirtyBitmap::new(size, granularity)),
            tell: RefCell::default(),
            lock: RangeLock::new(),
        }
    }

    /// Tells the job from now on what becomes dirty.
    pub fn on_dirty(&self, sink: Option<DirtySink>) {
        *self.tell.borrow_mut() = sink;
    }

    /// The edge to copy from; no gate stands at it.
    pub fn source(&self) -> &Rc<Child> {
        &self.child
    }

    /// The edge to copy to; no gate stands at it.
    pub fn target(&self) -> &Rc<Child> {
        &self.target
    }

    /// When the target gets a guest's writes.
    pub fn mode(&self) -> CopyMode {
        self.mode.get()
    }

    /// Writes that begin from now on go by this mode.
    pub fn set_mode(&self, mode: CopyMode) {
        self.mode.set(mode);
    }

    /// The range is to be copied.
    pub fn mark(&self, range: ByteRange) {
        let new = self.dirty.borrow_mut().set(range);
        let tell = self.tell.borrow().clone();
        if let Some(tell) = tell.filter(|_| new > 0) {
            tell(new);
        }
    }

    /// Bytes that one mark stands for.
    pub fn granularity(&self) -> u64 {
        self.dirty.borrow().granularity()
    }

    /// All is copied.
    pub fn is_clean(&self) -> bool {
        self.dirty.borrow().is_clean()
    }

    /// Bytes that are to be copied.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.borrow().dirty_bytes()
    }

    /// Takes the first part from `start` on that is to be copied, at most `most` bytes: it is clean from
    /// now on, and whoever took it copies it or marks it again.
    pub fn take(&self, start: u64, most: u64) -> Option<ByteRange> {
        let mut dirty = self.dirty.borrow_mut();
        let run = dirty.next_run(start, most)?;
        dirty.clear(run);
        Some(run)
    }

    /// Holds writes that go to both off a part that is copied.
    pub async fn hold(&self, range: ByteRange) -> RangeGuard {
        self.lock.lock(range, LockMode::Exclusive).await
    }

    /// A change of the range, at the child, and at the target where the mode says so.
    async fn change(
        &self,
        range: ByteRange,
        here: impl Future<Output = Result<()>>,
        there: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        if self.mode.get() == CopyMode::Background {
            let result = here.await;
            // Also after a failure: some of it may have changed.
            self.mark(range);
            return result;
        }
        let _held = self.hold(range).await;
        let result = here.await;
        if result.is_err() {
            self.mark(range);
            return result;
        }
        if let Err(error) = there.await {
            // The guest's write is safe; the job meets the target's error when it copies the range.
            tracing::warn!(node = self.target.node().name(), %error, "a write did not reach a target");
            self.mark(range);
        }
        Ok(())
    }
}

impl Driver for MirrorTop {
    fn driver_name(&self) -> &'static str {
        "mirror_top"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(child: size, limits, flush, block_status);

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.child.read(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        let here = self.child.write(offset, payload.clone(), flags);
        let there = self.target.write(offset, payload, WriteFlags::empty());
        Box::pin(self.change(range, here, there))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        let here = self.child.write_zeroes(range, flags);
        let there = flags - ZeroFlags::FUA - ZeroFlags::NO_FALLBACK;
        let there = self.target.write_zeroes(range, there);
        Box::pin(self.change(range, here, there))
    }

    /// What a discarded range reads as is the child's affair; the job looks and copies that.
    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _held = self.hold(range).await;
            let result = self.child.discard(range).await;
            self.mark(range);
            result
        })
    }

    fn truncate(&self, _size: u64, _options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(async {
            let message = "A node that is being copied cannot be resized";
            Err(Error::new(ErrorKind::InUse, message))
        })
    }

    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        (transfer.kind == TransferKind::Read).then(|| Forward {
            child: self.child.clone(),
            offset: transfer.offset,
            guard: None,
        })
    }

    /// Users write through the filter as they would without. What lies below is a mixture to all others
    /// while the target is one of the child's own layers, so that nothing is claimed of it.
    fn child_permissions(&self, role: Role, users: Permissions, writable: bool) -> Permissions {
        let _ = writable;
        match role {
            Role::Target => Permissions {
                required: Permission::WRITE,
                shared: Permission::all() - Permission::RESIZE,
            },
            _ => Permissions {
                required: users.required - Permission::CONSISTENT_READ,
                shared: Permission::all() - Permission::RESIZE,
            },
        }
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

//! `mirror_top`: stands above what a job copies while a guest writes it, and sees to it that the copy
//! follows.
//!
//! In the background mode a write goes to the child only, and what it changed is marked dirty when it
//! has ended; the job clears a mark before it reads, so that a write beside the copy is copied again. In
//! the write-blocking mode a write goes to the child and to the target, alone in its range, and is
//! answered when it is in both; nothing new becomes dirty, and the job ends however much is written.
//! At the end the ways part, in a drained section: what is written from then on, the target does not get.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use crate::block::{
    Child, DirtyBitmap, Driver, Extent, ExtentKind, Forward, IoFuture, Limits, LockMode,
    Permission, Permissions, RangeGuard, RangeLock, Role, Transfer, TransferKind, TruncateOptions,
    WriteFlags, ZeroFlags,
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

/// Where the target lies, seen from the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One of the child's own layers. To all others that is a mixture.
    Below,
    /// Apart from it: nobody else reads or writes the target.
    Apart,
    /// An overlay over it, which is written below the target.
    Above,
}

/// How a [`MirrorTop`] follows.
#[derive(Clone, Copy, Debug)]
pub struct MirrorOptions {
    /// Where the target lies.
    pub place: Place,
    /// Bytes that one mark stands for; a power of two.
    pub granularity: u64,
    /// The target is only written in whole parts of that many bytes: it could not fill the rest of one.
    pub only_whole: bool,
}

/// What the job of a [`MirrorTop`] wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorNews {
    /// This many bytes have become dirty.
    Dirty(u64),
    /// This many bytes of a user's went to both sides.
    Followed(u64),
}

/// Who is told.
pub type MirrorSink = Rc<dyn Fn(MirrorNews)>;

/// Where a change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// To the child alone.
    Here,
    /// To the child; the job follows.
    Marked,
    /// To the child and to the target.
    Both,
}

/// The driver.
pub struct MirrorTop {
    child: Rc<Child>,
    target: Rc<Child>,
    options: MirrorOptions,
    mode: Cell<CopyMode>,
    parted: Cell<bool>,
    dirty: RefCell<DirtyBitmap>,
    tell: RefCell<Option<MirrorSink>>,
    lock: RangeLock,
}

impl MirrorTop {
    /// Above the node of `child`, whose content goes to the node of `target`. Nothing is dirty yet.
    pub fn new(child: Rc<Child>, target: Rc<Child>, options: MirrorOptions) -> MirrorTop {
        let size = child.node().size();
        MirrorTop {
            child,
            target,
            options,
            mode: Cell::default(),
            parted: Cell::new(false),
            dirty: RefCell::new(DirtyBitmap::new(size, options.granularity)),
            tell: RefCell::default(),
            lock: RangeLock::new(),
        }
    }

    /// Tells the job from now on.
    pub fn on_news(&self, sink: Option<MirrorSink>) {
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

    /// The target gets nothing more, nor does anything become dirty. In a drained section: between two
    /// writes. With the next update of permissions the filter lets the target go.
    pub fn part(&self) {
        self.parted.set(true);
    }

    /// The target gets writes again; those meanwhile it lacks.
    pub fn rejoin(&self) {
        self.parted.set(false);
    }

    /// The range is to be copied.
    pub fn mark(&self, range: ByteRange) {
        let new = self.dirty.borrow_mut().set(range);
        if new > 0 {
            self.tell(MirrorNews::Dirty(new));
        }
    }

    fn tell(&self, news: MirrorNews) {
        let tell = self.tell.borrow().clone();
        if let Some(tell) = tell {
            tell(news);
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

    fn way(&self, range: ByteRange) -> Way {
        let unit = self.options.granularity;
        let cuts = self.options.only_whole && range.align_outward(unit) != range;
        match self.mode.get() {
            _ if self.parted.get() => Way::Here,
            CopyMode::WriteBlocking if !cuts => Way::Both,
            _ => Way::Marked,
        }
    }

    /// A change of the range, at the child, and at the target where the mode says so.
    async fn change<H, T>(
        &self,
        range: ByteRange,
        here: impl FnOnce() -> H,
        there: impl FnOnce() -> T,
    ) -> Result<()>
    where
        H: Future<Output = Result<()>>,
        T: Future<Output = Result<()>>,
    {
        match self.way(range) {
            Way::Here => here().await,
            Way::Marked => {
                let result = here().await;
                // Also after a failure: some of it may have changed.
                self.mark(range);
                result
            }
            Way::Both => self.change_both(range, here(), there()).await,
        }
    }

    async fn change_both(
        &self,
        range: ByteRange,
        here: impl Future<Output = Result<()>>,
        there: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let _held = self.hold(range).await;
        let (here, there) = match self.options.place {
            // The target changes only where a layer above hides it.
            Place::Below => match here.await {
                Ok(()) => (Ok(()), there.await),
                failed => (failed, Ok(())),
            },
            Place::Apart | Place::Above => join(here, there).await,
        };
        match (&here, there) {
            (Ok(()), Ok(())) => self.tell(MirrorNews::Followed(range.length())),
            (Ok(()), Err(error)) => {
                // The guest's write is safe; the job meets the target's error when it copies the range.
                tracing::warn!(node = self.target.node().name(), %error, "a write did not reach a target");
                self.mark(range);
            }
            (Err(_), _) => self.mark(range),
        }
        here
    }
}

impl MirrorTop {
    /// Makes a range of the target zeroes if that is what the child reads as; false: it is to be copied.
    async fn zero_target(&self, range: ByteRange) -> bool {
        let mut rest = range;
        while !rest.is_empty() {
            match self.child.status_through(rest, None).await {
                Ok(status) if !matches!(status.extent.kind, ExtentKind::Data { .. }) => {
                    let next = rest.start() + status.extent.length;
                    rest = ByteRange::between(next, rest.end());
                }
                _ => return false,
            }
        }
        let zeroed = self.target.write_zeroes(range, ZeroFlags::MAY_UNMAP);
        zeroed.await.is_ok()
    }
}

/// Both to their ends, side by side.
async fn join<A: Future, B: Future>(one: A, other: B) -> (A::Output, B::Output) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut first, mut second) = (None, None);
    poll_fn(|context| {
        if first.is_none()
            && let Poll::Ready(output) = one.as_mut().poll(context)
        {
            first = Some(output);
        }
        if second.is_none()
            && let Poll::Ready(output) = other.as_mut().poll(context)
        {
            second = Some(output);
        }
        match (first.take(), second.take()) {
            (Some(one), Some(other)) => Poll::Ready((one, other)),
            (one, other) => {
                (first, second) = (one, other);
                Poll::Pending
            }
        }
    })
    .await
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
        Box::pin(async move {
            let copy = payload.clone();
            let here = || self.child.write(offset, payload, flags);
            let there = || self.target.write(offset, copy, WriteFlags::empty());
            self.change(range, here, there).await
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        let flags_there = flags - ZeroFlags::FUA - ZeroFlags::NO_FALLBACK;
        Box::pin(async move {
            let here = || self.child.write_zeroes(range, flags);
            let there = || self.target.write_zeroes(range, flags_there);
            self.change(range, here, there).await
        })
    }

    /// What a discarded range reads as is the child's affair. Where that is zeroes, a target that gets
    /// users' writes gets these, too; else the job looks and copies.
    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _held = self.hold(range).await;
            let result = self.child.discard(range).await;
            match self.way(range) {
                Way::Here => {}
                Way::Both if result.is_ok() && self.zero_target(range).await => {
                    self.tell(MirrorNews::Followed(range.length()));
                }
                Way::Both | Way::Marked => self.mark(range),
            }
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

    /// Users write through the filter as they would without. Where the target is a layer below, that is a
    /// mixture to all others, so that nothing is claimed of it.
    fn child_permissions(&self, role: Role, users: Permissions, writable: bool) -> Permissions {
        let _ = writable;
        let place = self.options.place;
        let unchanged = Permission::WRITE_UNCHANGED;
        if role != Role::Target {
            return Permissions {
                required: match place {
                    Place::Below => users.required - Permission::CONSISTENT_READ,
                    Place::Apart | Place::Above => users.required,
                },
                shared: Permission::all() - Permission::RESIZE,
            };
        }
        if self.parted.get() {
            return Permissions::NONE;
        }
        Permissions {
            required: Permission::WRITE,
            shared: match place {
                Place::Below => Permission::all() - Permission::RESIZE,
                Place::Apart => unchanged,
                Place::Above => unchanged | Permission::WRITE,
            },
        }
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

//! What a disk held at one moment, while the disk goes on: a part is in the disk itself until it is about
//! to change, and in the target from then on.

mod reading;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use crate::block::{
    Child, DirtyBitmap, ExtentKind, LockMode, RangeGuard, RangeLock, WriteFlags, ZeroFlags,
};
use crate::buffer::BufferPool;
use crate::error::{Error, Result};
use crate::range::{ByteRange, align_down};
use crate::runtime::sync::Notify;

/// Bytes that go through memory at once, where clusters of the target are not larger.
const PIECE: u64 = 1 << 20;

/// Spare buffers that are kept.
const MOST_SPARE: usize = 4;

/// What happens to a [`Snapshot`], for a job that works with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotEvent {
    /// A guest was about to change this many bytes, and they are saved.
    Saved(u64),
    /// It has come to an end; see [`Snapshot::failure`].
    Broken,
}

type Sink = Rc<dyn Fn(SnapshotEvent)>;

/// The content of a disk at the moment when this was made. Whoever changes the disk calls
/// [`Snapshot::save`] before.
///
/// A cluster is *live* (to be saved, and read from the disk), *saved* (read from the target), or neither:
/// then the snapshot has it no more, or never had. Live clusters become one of the others, never the
/// other way round. Who saves a cluster holds it alone, who reads it holds it with other readers.
pub struct Snapshot {
    file: Rc<Child>,
    target: Rc<Child>,
    piece: u64,
    compressed: Cell<bool>,
    live: RefCell<DirtyBitmap>,
    saved: RefCell<DirtyBitmap>,
    lock: RangeLock,
    failure: RefCell<Option<Error>>,
    tell: RefCell<Option<Sink>>,
    /// Clusters that are being saved, and those of them whose disk is being read.
    saving: Cell<u32>,
    reading: Cell<u32>,
    changed: Notify,
    buffers: BufferPool,
}

impl Snapshot {
    /// Of the node of `file` as it is now; what goes away there is kept in the node of `target`, in
    /// clusters of `cluster` bytes, a power of two. Nobody changes the disk until this has returned.
    pub(super) fn new(file: Rc<Child>, target: Rc<Child>, cluster: u64) -> Snapshot {
        let size = file.node().size();
        let mut live = DirtyBitmap::new(size, cluster);
        live.set(ByteRange::between(0, size));
        let target_cluster = u64::from(target.node().driver().limits().optimal_transfer);
        let piece = PIECE.max(target_cluster);
        Snapshot {
            file,
            target,
            piece,
            compressed: Cell::new(false),
            live: RefCell::new(live),
            saved: RefCell::new(DirtyBitmap::new(size, cluster)),
            lock: RangeLock::new(),
            failure: RefCell::default(),
            tell: RefCell::default(),
            saving: Cell::new(0),
            reading: Cell::new(0),
            changed: Notify::new(),
            buffers: BufferPool::new(piece as usize, MOST_SPARE),
        }
    }

    /// The edge to the disk; no gate stands at it.
    pub fn file(&self) -> &Rc<Child> {
        &self.file
    }

    /// The edge to where things are saved; no gate stands at it.
    pub fn target(&self) -> &Rc<Child> {
        &self.target
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.live.borrow().granularity()
    }

    /// From now on data is saved compressed, or not; the target can.
    pub fn set_compressed(&self, compressed: bool) {
        self.compressed.set(compressed);
    }

    /// Tells a job from now on what happens.
    pub fn on_event(&self, sink: Option<Sink>) {
        *self.tell.borrow_mut() = sink;
    }

    /// Why it has come to an end, if it has.
    pub fn failure(&self) -> Option<Error> {
        let failure = self.failure.borrow();
        failure.as_ref().map(Error::duplicate)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// The end of the snapshot: changes of the disk wait no more, and it cannot be read.
    pub(super) fn break_off(&self, error: Error) {
        if self.is_broken() {
            return;
        }
        let node = self.file.node();
        tracing::error!(node = node.name(), %error, "a snapshot ends: what was about to change was not saved");
        *self.failure.borrow_mut() = Some(error);
        self.changed.notify_all();
        self.report(SnapshotEvent::Broken);
    }

    /// Something of the range must be saved before it changes.
    pub(super) fn is_live(&self, range: ByteRange) -> bool {
        !self.is_broken() && self.first_live(range).is_some()
    }

    /// The clusters that a range touches.
    fn clusters(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.cluster_size())
    }

    fn first_live(&self, range: ByteRange) -> Option<u64> {
        self.live.borrow().first_dirty(self.clusters(range))
    }

    /// The first live clusters from `start` on, which begins one; at most `most` bytes of them, at least one.
    pub fn next_live(&self, start: u64, most: u64) -> Option<ByteRange> {
        let live = self.live.borrow();
        live.next_run(start, align_down(most, live.granularity()))
    }

    /// Live bytes of the disk.
    pub fn live_bytes(&self) -> u64 {
        let live = self.live.borrow();
        let (size, cluster) = (live.size(), live.granularity());
        let rounded = size.next_multiple_of(cluster);
        let last = ByteRange::between(size.saturating_sub(1), size);
        let beyond = match live.first_dirty(last) {
            Some(_) => rounded - size,
            None => 0,
        };
        live.dirty_bytes() - beyond
    }

    /// Looks at what is live.
    pub fn with_live<T>(&self, look: impl FnOnce(&DirtyBitmap) -> T) -> T {
        look(&self.live.borrow())
    }

    /// Only clusters of which something is set here are the snapshot's. Nothing was saved yet.
    pub fn restrict(&self, bits: &DirtyBitmap) {
        let mut live = self.live.borrow_mut();
        let mut selected = DirtyBitmap::new(live.size(), live.granularity());
        selected.merge(bits);
        *live = selected;
    }

    /// The snapshot does not have the range any more, and nothing of it is to be saved.
    pub fn give_up(&self, range: ByteRange) {
        self.live.borrow_mut().clear(range);
        self.saved.borrow_mut().clear(range);
    }

    /// These clusters are in the target. The caller holds them.
    pub fn set_saved(&self, range: ByteRange) {
        self.saved.borrow_mut().set(range);
        self.live.borrow_mut().clear(range);
    }

    /// Keeps everybody else off a range: whoever saves it, and who reads it. What was live before may be
    /// saved by now: look again.
    ///
    /// # Errors
    /// The snapshot has come to an end.
    pub async fn hold(&self, range: ByteRange) -> Result<RangeGuard> {
        self.lock_clusters(range, LockMode::Exclusive).await
    }

    async fn lock_clusters(&self, range: ByteRange, mode: LockMode) -> Result<RangeGuard> {
        let held = self.lock.lock(self.clusters(range), mode);
        self.unless_broken(held).await
    }

    /// What a future gives, or why the snapshot has come to an end before.
    pub(super) async fn unless_broken<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let mut future = pin!(future);
        let mut changed = pin!(self.changed.notified());
        poll_fn(|context| {
            if let Some(error) = self.failure() {
                return Poll::Ready(Err(error));
            }
            if let Poll::Ready(value) = future.as_mut().poll(context) {
                return Poll::Ready(Ok(value));
            }
            while changed.as_mut().poll(context).is_ready() {
                changed.set(self.changed.notified());
            }
            Poll::Pending
        })
        .await
    }

    fn report(&self, event: SnapshotEvent) {
        let tell = self.tell.borrow().clone();
        if let Some(tell) = tell {
            tell(event);
        }
    }
}

/// Saving.
impl Snapshot {
    /// Saves what of the range is live, so that it may change. Runs to its end also where nobody waits.
    ///
    /// # Errors
    /// What the edges say: what was not saved is live as before. The snapshot has come to an end.
    pub(super) async fn save(&self, range: ByteRange) -> Result<()> {
        let clusters = self.clusters(range);
        let _count = Count::one_more(&self.saving, &self.changed);
        let mut start = clusters.start();
        while let Some(found) = self.live_in(start, clusters.end()) {
            start = found.end();
            let _held = self.hold(found).await?;
            while let Some(run) = self.live_in(found.start(), found.end()) {
                self.copy(run).await?;
                self.set_saved(run);
                self.report(SnapshotEvent::Saved(run.length()));
            }
        }
        Ok(())
    }

    /// The first live clusters of a range, not more than a piece.
    fn live_in(&self, start: u64, end: u64) -> Option<ByteRange> {
        let live = self.live.borrow();
        let first = live.first_dirty(ByteRange::between(start, end.max(start)))?;
        live.next_run(first, self.piece.min(end - first))
    }

    /// Copies clusters to the target. The caller holds them.
    async fn copy(&self, run: ByteRange) -> Result<()> {
        let mut start = run.start();
        while start < run.end() {
            let rest = ByteRange::between(start, run.end());
            let (zeroes, part) = self.next_part(rest).await?;
            if zeroes {
                let may_unmap = ZeroFlags::MAY_UNMAP;
                self.target.write_zeroes(part, may_unmap).await?;
            } else {
                self.copy_data(part).await?;
            }
            start = part.end();
        }
        Ok(())
    }

    /// The first part of a range that goes across in one way, in whole clusters: as zeroes or not.
    async fn next_part(&self, range: ByteRange) -> Result<(bool, ByteRange)> {
        let _count = Count::one_more(&self.reading, &self.changed);
        let extent = self.file.status_through(range, None).await?.extent;
        let end = range.start() + extent.length;
        let is_zero = !matches!(extent.kind, ExtentKind::Data { .. });
        let whole = if end == range.end() {
            end
        } else {
            align_down(end, self.cluster_size())
        };
        if is_zero && whole > range.start() {
            return Ok((true, ByteRange::between(range.start(), whole)));
        }
        let data = ByteRange::between(range.start(), end.min(range.start() + self.piece));
        let data_end = self.clusters(data).end().min(range.end());
        let data_end = data_end.min(range.start() + self.piece);
        Ok((false, ByteRange::between(range.start(), data_end)))
    }

    async fn copy_data(&self, part: ByteRange) -> Result<()> {
        let buffer = self.buffers.take().slice(0, part.length() as usize);
        let count = Count::one_more(&self.reading, &self.changed);
        self.file.read(part.start(), buffer.clone().into()).await?;
        drop(count);
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::COMPRESSED, self.compressed.get());
        self.target.write(part.start(), buffer.into(), flags).await
    }

    /// Waits until nothing is being saved; of a snapshot that has come to an end, until the disk is not
    /// read.
    pub(super) async fn until_quiet(&self) {
        let is_busy = || match self.is_broken() {
            true => self.reading.get() > 0,
            false => self.saving.get() > 0,
        };
        while is_busy() {
            self.changed.notified().await;
        }
    }

    /// Waits until nothing is on its way to the target.
    pub(super) async fn until_idle(&self) {
        while self.saving.get() > 0 {
            self.changed.notified().await;
        }
    }
}

/// One more, until dropped; then whoever waits looks again.
struct Count<'a> {
    counter: &'a Cell<u32>,
    changed: &'a Notify,
}

impl<'a> Count<'a> {
    fn one_more(counter: &'a Cell<u32>, changed: &'a Notify) -> Count<'a> {
        counter.set(counter.get() + 1);
        Count { counter, changed }
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.counter.set(self.counter.get() - 1);
        self.changed.notify_all();
    }
}

//! The long part of a backup, and its end.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::start::release;
use super::tracking::Tracking;
use super::{Backup, BackupSync};
use crate::block::{Child, ExtentKind, Node};
use crate::error::Result;
use crate::filter::{Snapshot, SnapshotEvent};
use crate::job::copy::{Copier, CopyError, CopyOptions, Pace};
use crate::job::pieces::{Crew, Pieces};
use crate::job::site::Site;
use crate::job::{Job, LocalFuture, Work, Workshop};
use crate::range::ByteRange;

/// Bytes that are held at once.
const MOST_HELD: u64 = 1 << 20;

/// Bytes in a piece at most where a speed limit pays for each.
const LIMITED_PIECE: u64 = 512 << 10;

/// What a backup works with from its moment on.
pub(super) struct Place {
    pub(super) filter: Rc<Node>,
    pub(super) snapshot: Rc<Snapshot>,
    /// The edge through which pieces pass.
    pub(super) gate: Rc<Child>,
    /// The user's bitmap.
    pub(super) tracking: Option<Tracking>,
}

pub(super) struct BackupWork {
    workshop: Workshop,
    arguments: Backup,
    filter: Rc<Node>,
    snapshot: Rc<Snapshot>,
    gate: Rc<Child>,
    tracking: RefCell<Option<Tracking>>,
    copier: Copier,
    pace: Pace,
    /// Where to look for something to copy next.
    cursor: Cell<u64>,
    site: Site,
    job: Rc<Job>,
}

impl BackupWork {
    pub(super) fn new(
        workshop: &Workshop,
        job: &Rc<Job>,
        arguments: Backup,
        place: Place,
        site: Site,
    ) -> Rc<BackupWork> {
        let pace = Pace::new(workshop.jobs.handle(), place.gate.clone(), Vec::new());
        let work = Rc::new(BackupWork {
            workshop: workshop.clone(),
            pace: pace.at_most(arguments.performance.max_workers),
            copier: Copier::new(copy_options(&arguments)),
            cursor: Cell::new(0),
            filter: place.filter,
            snapshot: place.snapshot,
            gate: place.gate,
            tracking: RefCell::new(place.tracking),
            arguments,
            site,
            job: job.clone(),
        });
        work.follow();
        work
    }

    /// Lets the job know what happens to what it copies.
    fn follow(&self) {
        let job = Rc::downgrade(&self.job);
        self.job.set_total(self.snapshot.live_bytes());
        self.snapshot.on_event(Some(Rc::new(move |event| {
            let Some(job) = job.upgrade() else { return };
            match event {
                SnapshotEvent::Saved(bytes) => job.advance(bytes),
                SnapshotEvent::Broken => job.look_again(),
            }
        })));
    }

    async fn copy_all(self: Rc<Self>) -> Result<()> {
        match self.arguments.sync {
            BackupSync::Nothing => self.until_cancelled().await,
            BackupSync::Full | BackupSync::Bitmap => {}
            BackupSync::Top => self.leave_out_unallocated().await?,
        }
        let crew = Crew::new(&self.job, self.arguments.on_error);
        crew.work_off(self.clone(), &self.pace).await?;
        match self.snapshot.failure() {
            Some(error) => Err(error),
            None if self.job.is_cancelled() => Ok(()),
            None => self.flush().await,
        }
    }

    async fn until_cancelled(&self) {
        let is_over = || self.snapshot.failure().is_some();
        while !self.job.is_cancelled() && !is_over() {
            self.job.until_told(is_over).await;
        }
    }

    async fn flush(&self) -> Result<()> {
        let _passage = self.gate.enter().await;
        self.snapshot.target().flush().await
    }

    /// What was copied of a backup that failed counts only where the target keeps it.
    async fn keeps_part(&self) -> bool {
        let wants_rest = self.tracking.borrow().as_ref().map(Tracking::wants_rest);
        wants_rest == Some(true) && self.flush().await.is_ok()
    }

    /// The user's bitmap says from now on what the backup leaves dirty.
    fn settle_bitmap(&self, succeeded: bool, keeps_part: bool) {
        let Some(tracking) = self.tracking.take() else {
            return;
        };
        if succeeded {
            tracking.copied();
        } else if keeps_part {
            self.snapshot.with_live(|live| tracking.copied_but(live));
        } else {
            tracking.not_copied();
        }
    }

    /// What the node's backing file has is not copied.
    async fn leave_out_unallocated(&self) -> Result<()> {
        let size = self.arguments.source.size();
        let cluster = self.snapshot.cluster_size();
        let mut start = 0;
        while start < size && !self.job.is_cancelled() {
            let _passage = self.gate.enter().await;
            let rest = ByteRange::between(start, size);
            let top = self.snapshot.file().node().without_filters();
            let extent = top.driver().block_status(within(rest, top.size())).await;
            let extent = extent?;
            let end = start + extent.length;
            if extent.kind == ExtentKind::Unallocated {
                let whole_end = if end == size { u64::MAX } else { end };
                let whole = ByteRange::between(start, whole_end).align_inward(cluster);
                if let Some(whole) = whole {
                    self.snapshot.give_up(whole);
                }
            }
            start = end;
        }
        let progress = self.job.progress();
        self.job
            .set_total(progress.current + self.snapshot.live_bytes());
        Ok(())
    }

    fn find(&self) -> Option<ByteRange> {
        if self.snapshot.failure().is_some() {
            return None;
        }
        let mut most = self.pace.piece_length();
        if self.job.speed() > 0 {
            most = LIMITED_PIECE;
        }
        if self.arguments.performance.max_chunk > 0 {
            most = most.min(self.arguments.performance.max_chunk);
        }
        let found = self.snapshot.next_live(self.cursor.get(), most)?;
        self.cursor.set(found.end());
        Some(found)
    }

    /// A piece is held in parts, each no longer than a guest's write may wait for.
    async fn copy_piece(&self, piece: ByteRange) -> Result<(), CopyError> {
        let mut start = piece.start();
        while let Some(found) = self.snapshot.next_live(start, MOST_HELD) {
            if found.start() >= piece.end() {
                break;
            }
            let part = ByteRange::between(found.start(), found.end().min(piece.end()));
            if !self.copy_held(part).await? {
                break;
            }
            start = part.end();
        }
        Ok(())
    }

    /// False: the snapshot has come to an end.
    async fn copy_held(&self, part: ByteRange) -> Result<bool, CopyError> {
        let snapshot = &self.snapshot;
        let _passage = self.gate.enter().await;
        let Ok(_held) = snapshot.hold(part).await else {
            return Ok(false);
        };
        let (from, to) = (snapshot.file(), snapshot.target());
        while let Some(run) = snapshot.next_live(part.start(), part.length()) {
            if run.start() >= part.end() {
                break;
            }
            let run = ByteRange::between(run.start(), run.end().min(part.end()));
            self.copier.copy(from, to, run).await?;
            // While the part is live its guests wait: what they write afterwards is not discarded.
            if self.arguments.discard_source
                && let Err(error) = from.discard(run).await
            {
                tracing::debug!(job = self.job.id(), %run, %error, "not discarded in the source");
            }
            snapshot.set_saved(run);
            self.job.advance(run.length());
        }
        Ok(true)
    }
}

impl Pieces for BackupWork {
    fn next(&self) -> LocalFuture<'_, Option<ByteRange>> {
        Box::pin(async { self.find() })
    }

    fn carry_out(&self, piece: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        Box::pin(self.copy_piece(piece))
    }

    fn ended(&self, _piece: ByteRange) {}

    fn retries(&self) -> bool {
        true
    }
}

impl Work for BackupWork {
    fn run(self: Rc<Self>, _job: Rc<Job>) -> LocalFuture<'static, Result<()>> {
        Box::pin(self.copy_all())
    }

    fn prepare(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn clean(&self, succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            self.snapshot.on_event(None);
            let keeps_part = !succeeded && self.keeps_part().await;
            release(&self.workshop, &self.filter);
            self.site.restore().await;
            // The last step: who was not told of the backup has its changes in the bitmap.
            self.settle_bitmap(succeeded, keeps_part);
        })
    }
}

fn copy_options(arguments: &Backup) -> CopyOptions {
    let defaults = CopyOptions::default();
    let cluster = arguments.target.driver().limits().optimal_transfer;
    CopyOptions {
        buffer_length: defaults.buffer_length.max(cluster as usize),
        file_slices: arguments.performance.use_copy_range,
        compress: arguments.compress,
        ..defaults
    }
}

/// The part of a range that lies within so many bytes; at least one byte.
fn within(range: ByteRange, size: u64) -> ByteRange {
    ByteRange::between(range.start(), range.end().min(size.max(range.start() + 1)))
}

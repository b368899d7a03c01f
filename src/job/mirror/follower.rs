//! Copies a node to another while a guest writes it, then follows the guest until it is told to complete
//! (the target takes the place of what it is a copy of) or to end (the target stays what it is then).
//!
//! Where a guest writes faster than is copied, its writes go to both.

use std::cell::Cell;
use std::rc::Rc;

use super::Course;
use super::pass::Passes;
use crate::block::{Child, Node};
use crate::error::{Error, Result};
use crate::filter::{CopyMode, MirrorNews, MirrorTop};
use crate::job::copy::{Copier, CopyError, CopyOptions, Pace};
use crate::job::pieces::{Crew, Pieces};
use crate::job::site::Site;
use crate::job::{ErrorAction, Job, JobKind, LocalFuture, Operation, Work, Workshop};
use crate::range::ByteRange;

/// Bytes that a step moves through memory at most.
const MOST_BUFFER: u64 = 1 << 20;

/// Rounds after it was told to end in which what is dirty still does not count as little.
const LAST_ROUNDS: u32 = 3;

/// What a job is set up to follow with.
pub(in crate::job) struct Post {
    /// The filter above the source, a [`MirrorTop`].
    pub(in crate::job) filter: Rc<Node>,
    /// The job's edge to it.
    pub(in crate::job) gate: Rc<Child>,
    /// What was taken for the job.
    pub(in crate::job) site: Site,
}

/// The work of a job that follows.
pub(in crate::job) struct Follower {
    workshop: Workshop,
    pub(super) course: Course,
    filter: Rc<Node>,
    pub(super) gate: Rc<Child>,
    copier: Copier,
    pace: Rc<Pace>,
    /// When the target gets users' writes, once the job has begun to copy.
    mode: Cell<CopyMode>,
    /// The mode as users know it: without the switch of a job that is told to end.
    shown: Cell<CopyMode>,
    begun: Cell<bool>,
    /// Where to look for something dirty next.
    cursor: Cell<u64>,
    passes: Passes,
    /// Rounds since it was told to end.
    last_rounds: Cell<u32>,
    /// At the end the target takes the place of what it copies.
    pivots: Cell<bool>,
    site: Site,
    pub(super) job: Rc<Job>,
}

impl Follower {
    /// The work of `job`, not begun yet.
    pub(in crate::job) fn new(
        workshop: &Workshop,
        job: &Rc<Job>,
        course: Course,
        post: Post,
    ) -> Follower {
        let Post { filter, gate, site } = post;
        let buffer = course.buffer.min(MOST_BUFFER);
        let most = (course.buffer / buffer).max(1);
        let pace = Pace::new(workshop.jobs.handle(), gate.clone(), Vec::new());
        Follower {
            pace: Rc::new(pace.at_most(most as usize)),
            copier: Copier::new(CopyOptions {
                buffer_length: buffer as usize,
                unmap: course.unmap,
                // The guest may move clusters of the source while they are copied.
                file_slices: false,
                compress: false,
            }),
            mode: Cell::new(course.copy_mode),
            shown: Cell::new(course.copy_mode),
            begun: Cell::new(false),
            cursor: Cell::new(0),
            passes: Passes::default(),
            last_rounds: Cell::new(0),
            pivots: Cell::new(true),
            workshop: workshop.clone(),
            job: job.clone(),
            course,
            filter,
            gate,
            site,
        }
    }

    pub(super) fn mirror(&self) -> &MirrorTop {
        match self.filter.driver_as() {
            Some(mirror) => mirror,
            None => unreachable!("the filter of a job that follows is a mirror_top node"),
        }
    }

    pub(super) fn whole(&self) -> ByteRange {
        ByteRange::between(0, self.course.source.size())
    }

    /// Carries out pieces until there are none, or the job is cancelled.
    pub(super) async fn work_off(&self, pieces: Rc<dyn Pieces>) -> Result<()> {
        let crew = Crew::new(&self.job, self.course.on_error);
        crew.work_off(pieces, &self.pace).await?;
        Ok(())
    }

    async fn follow(self: Rc<Self>) -> Result<()> {
        self.hear();
        self.begin().await?;
        self.begun.set(true);
        self.mirror().set_mode(self.mode.get());
        loop {
            let told = self.is_told_to_end();
            if told {
                // However much is written from now on, no more becomes dirty, but by discards.
                self.switch_to(CopyMode::WriteBlocking);
                self.last_rounds.set(self.last_rounds.get() + 1);
            }
            self.work_off(self.clone()).await?;
            self.job.until_unpaused().await;
            if self.job.is_cancelled() {
                return Ok(());
            }
            if !self.is_nearly_clean() {
                continue;
            }
            self.job.become_ready();
            if !told {
                self.job.until_told(|| !self.mirror().is_clean()).await;
            } else if self.end().await? {
                return Ok(());
            } else {
                self.last_rounds.set(0);
            }
        }
    }

    /// The job's progress goes by what the filter tells.
    fn hear(&self) {
        let weak = Rc::downgrade(&self.job);
        self.mirror().on_news(Some(Rc::new(move |news| {
            let Some(job) = weak.upgrade() else { return };
            match news {
                MirrorNews::Dirty(bytes) => {
                    job.add_total(bytes);
                    job.look_again();
                }
                MirrorNews::Followed(bytes) => {
                    job.add_total(bytes);
                    job.advance(bytes);
                }
            }
        })));
    }

    /// Nothing is left to copy, or so little that users can wait for it.
    fn is_nearly_clean(&self) -> bool {
        self.mirror().is_clean() || self.last_rounds.get() > LAST_ROUNDS
    }

    fn is_told_to_end(&self) -> bool {
        let job = &self.job;
        let told = job.is_completing() || job.is_cancelled_softly();
        told && !job.is_paused()
    }

    /// What is written goes to both. False: something failed, and is to be copied again.
    async fn end(&self) -> Result<bool> {
        let pivots = !self.job.is_cancelled_softly();
        self.pivots.set(pivots);
        if !self.flush().await? {
            return Ok(false);
        }
        if pivots {
            return Ok(true);
        }
        Ok(self.part().await? && self.flush().await?)
    }

    /// From one instant on the target stays what it is.
    async fn part(&self) -> Result<bool> {
        let filter = std::slice::from_ref(&self.filter);
        let _drained = self.workshop.graph.drain(filter).await?;
        if self.catch_up().await.is_err() {
            // What failed is dirty again: it is met where the policy for it is known.
            return Ok(false);
        }
        self.mirror().part();
        Ok(true)
    }

    async fn flush(&self) -> Result<bool> {
        let passage = self.gate.enter().await;
        let flushed = self.mirror().target().flush().await;
        drop(passage);
        let Err(error) = flushed else {
            return Ok(true);
        };
        let policy = self.course.on_error.of(Operation::Write);
        if self.job.failed(policy, Operation::Write, &error) == ErrorAction::Report {
            return Err(error);
        }
        // Whatever was written since the last flush may be lost.
        self.mirror().rejoin();
        self.mirror().mark(self.whole());
        Ok(false)
    }

    fn find(&self) -> Option<ByteRange> {
        let most = if self.job.speed() > 0 {
            self.course.buffer
        } else {
            self.piece_length()
        };
        let mirror = self.mirror();
        let found = mirror.take(self.cursor.get(), most).or_else(|| {
            self.begin_pass();
            mirror.take(0, most)
        })?;
        self.cursor.set(found.end());
        Some(found)
    }

    fn piece_length(&self) -> u64 {
        self.pace.piece_length().min(self.course.buffer)
    }

    /// The end of the disk was reached.
    fn begin_pass(&self) {
        let mirror = self.mirror();
        let dirty = mirror.dirty_bytes();
        if !self.passes.begin(dirty) && mirror.mode() == CopyMode::Background {
            tracing::info!(
                job = self.job.id(),
                dirty,
                "the guest writes faster than is copied: its writes go to both from now on"
            );
            self.change_mode(CopyMode::WriteBlocking);
        }
    }

    fn change_mode(&self, mode: CopyMode) {
        self.shown.set(mode);
        self.switch_to(mode);
    }

    fn switch_to(&self, mode: CopyMode) {
        self.mode.set(mode);
        if self.begun.get() {
            self.mirror().set_mode(mode);
        }
    }

    async fn copy(&self, piece: ByteRange) -> Result<(), CopyError> {
        let _passage = self.gate.enter().await;
        self.copy_within(piece).await
    }

    /// No gate is waited at.
    async fn copy_within(&self, piece: ByteRange) -> Result<(), CopyError> {
        let mirror = self.mirror();
        let _held = mirror.hold(piece).await;
        let (from, to) = (mirror.source(), mirror.target());
        self.copier.copy(from, to, piece).await
    }

    /// The target takes the place of what it copies.
    async fn pivot(&self) -> Result<()> {
        let Course { source, target, .. } = &self.course;
        let graph = &self.workshop.graph;
        self.get_ready().await?;
        let drained = graph.drain(&[self.filter.clone(), target.clone()]).await?;
        self.catch_up().await?;
        self.flush_both().await?;
        self.mirror().part();
        graph.refresh_permissions(std::slice::from_ref(&self.filter))?;
        graph.redirect(&drained, &self.users(), target)?;
        self.site.leave_writable(target);
        // The device has moved: nothing of what follows makes that untrue.
        if self.course.becomes_backing
            && let Err(error) = self.workshop.images.make_read_only(source).await
        {
            let (job, node) = (self.job.id(), source.name());
            tracing::warn!(job, node, %error, "the old disk stays writable below its overlay");
        }
        drop(drained);
        Ok(())
    }

    /// What the target holds, and what it relies on, is durable: after the pivot no flush reaches the old disk.
    async fn flush_both(&self) -> Result<()> {
        if self.course.becomes_backing {
            self.mirror().source().flush().await?;
        }
        self.mirror().target().flush().await
    }

    /// What can be done while users go on.
    async fn get_ready(&self) -> Result<()> {
        let _passage = self.gate.enter().await;
        self.catch_up().await?;
        self.flush_both().await
    }

    /// Copies what is dirty: a write to both may have failed at the target.
    async fn catch_up(&self) -> Result<()> {
        let mirror = self.mirror();
        let mut from = 0;
        while let Some(piece) = mirror.take(from, self.piece_length()) {
            from = piece.end();
            if let Err(failure) = self.copy_within(piece).await {
                mirror.mark(piece);
                return Err(failure.error().duplicate());
            }
            self.ended(piece);
        }
        Ok(())
    }

    /// Whose disk is exchanged.
    fn users(&self) -> Vec<Rc<Child>> {
        let replaced = self.course.replaced.as_ref().unwrap_or(&self.filter);
        let mut users = replaced.parents();
        users.retain(|edge| edge.follows());
        users
    }
}

impl Pieces for Follower {
    fn next(&self) -> LocalFuture<'_, Option<ByteRange>> {
        Box::pin(async { self.find() })
    }

    fn carry_out(&self, piece: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        Box::pin(self.copy(piece))
    }

    fn ended(&self, piece: ByteRange) {
        let granularity = self.mirror().granularity();
        let bytes = piece.align_outward(granularity).length();
        self.job.advance(bytes);
    }

    fn retries(&self) -> bool {
        true
    }
}

impl Work for Follower {
    fn run(self: Rc<Self>, _job: Rc<Job>) -> LocalFuture<'static, Result<()>> {
        Box::pin(self.follow())
    }

    fn prepare(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            if self.pivots.get() {
                self.pivot().await
            } else {
                Ok(())
            }
        })
    }

    fn clean(&self, _succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(async {
            self.mirror().on_news(None);
            self.site.restore().await;
        })
    }

    fn change_copy_mode(&self, mode: CopyMode) -> Result<()> {
        if mode == CopyMode::Background && self.mode.get() == CopyMode::WriteBlocking {
            let message = "Change to copy mode 'background' is not implemented";
            return Err(Error::refused(message));
        }
        self.change_mode(mode);
        Ok(())
    }

    fn is_in_step(&self) -> Option<bool> {
        let mirror = self.mirror();
        let both =
            self.shown.get() == CopyMode::WriteBlocking && self.begun.get() && mirror.is_clean();
        (self.job.kind() == JobKind::Mirror).then_some(both)
    }

    fn ends_well_when_cancelled_ready(&self) -> bool {
        true
    }
}

//! `commit` of the active layer: pushes everything above the base into it while a guest writes, then
//! follows the guest until it is told to complete (the base takes the active layer's place) or to end.
//!
//! The base changes only where a layer above hides it, so that the chain shows the same at every instant,
//! and no header is changed at all. Where a guest writes faster than is copied, its writes go to both.

use std::cell::Cell;
use std::rc::Rc;

use super::chain::{check_no_other_reader, layers};
use super::commit::{Commit, MIXED, open_base};
use super::copy::{Copier, CopyError, CopyOptions, Pace};
use super::pieces::{Crew, Pieces};
use super::site::Site;
use super::{ErrorPolicies, Job, JobKind, LocalFuture, Work, Workshop};
use crate::block::{Child, Node, Permission, Permissions, Role, status_above};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{CopyMode, MirrorTop};
use crate::range::ByteRange;

/// Bytes that one dirty bit stands for, where the base's clusters are not smaller.
const MOST_GRANULARITY: u64 = 64 << 10;
const LEAST_GRANULARITY: u64 = 4 << 10;

/// Bytes in a piece at most where a speed limit pays for each, as in QEMU.
const LIMITED_PIECE: u64 = 16 << 20;

/// Others may use the active layer, and nobody resizes it.
const FOLLOWED: Permissions = Permissions {
    required: Permission::empty(),
    shared: Permission::all().difference(Permission::RESIZE),
};

/// Of the job's I/O, through the filter.
const FOLLOWER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ,
    shared: FOLLOWED.shared,
};

/// Starts a commit of the active layer.
///
/// # Errors
/// In QEMU's words; nothing has changed.
pub async fn commit_active(workshop: &Workshop, arguments: Commit) -> Result<Rc<Job>> {
    let committed = layers(&arguments.top, Some(&arguments.base));
    check_no_other_reader(&committed, &arguments.base)?;
    let job = workshop
        .jobs
        .create(JobKind::Commit, arguments.job.clone())?;
    let site = Site::new(workshop, JobKind::Commit, &arguments.job.id);
    match set_up(&site, &arguments, &committed).await {
        Ok((filter, gate)) => {
            site.begin();
            let work = ActiveCommit {
                workshop: workshop.clone(),
                pace: Rc::new(Pace::new(workshop.jobs.handle(), gate.clone(), Vec::new())),
                // The guest may move clusters of the source while they are copied.
                copier: Copier::new(CopyOptions {
                    file_slices: false,
                    ..CopyOptions::default()
                }),
                cursor: Cell::new(0),
                pass: Cell::new(Pass::default()),
                pivots: Cell::new(true),
                arguments,
                filter,
                gate,
                site,
                job: job.clone(),
            };
            workshop.jobs.start(&job, Rc::new(work));
            Ok(job)
        }
        Err(error) => {
            site.restore().await;
            workshop.jobs.give_up(&job);
            Err(error)
        }
    }
}

async fn set_up(
    site: &Site,
    arguments: &Commit,
    committed: &[Rc<Node>],
) -> Result<(Rc<Node>, Rc<Child>)> {
    let Commit { top, base, .. } = arguments;
    let name = arguments.filter_node_name.as_deref();
    open_base(site, arguments).await?;
    let cluster = u64::from(base.driver().limits().optimal_transfer);
    let granularity = cluster.clamp(LEAST_GRANULARITY, MOST_GRANULARITY);
    let children = [(Role::Backing, top), (Role::Target, base)];
    let put = site.put_filter(name, &children, |edges| {
        let (child, target) = (edges[0].clone(), edges[1].clone());
        let mirror = MirrorTop::new(child, target, granularity);
        mirror.set_mode(arguments.copy_mode);
        Box::new(mirror)
    });
    let filter = put.await?;
    let gate = site.hold(Role::MainNode, &filter, FOLLOWER)?;
    site.hold(Role::Source, top, FOLLOWED)?;
    site.hold(Role::Target, base, Permissions::NONE)?;
    for layer in committed.iter().skip(1) {
        site.hold(Role::IntermediateNode, layer, MIXED)?;
    }
    Ok((filter, gate))
}

/// What was dirty when the job began to go through the disk once more.
#[derive(Clone, Copy, Default)]
struct Pass {
    dirty: u64,
    /// Passes in a row that left more than half of what there was.
    in_vain: u32,
    /// Passes since nothing was dirty.
    passes: u32,
}

/// After so many passes in vain the guest's writes go to both.
const MOST_IN_VAIN: u32 = 2;

/// After so many passes without an end they do too: the guest may write in bursts.
const MOST_PASSES: u32 = 16;

struct ActiveCommit {
    workshop: Workshop,
    arguments: Commit,
    filter: Rc<Node>,
    gate: Rc<Child>,
    copier: Copier,
    pace: Rc<Pace>,
    /// Where to look for something dirty next.
    cursor: Cell<u64>,
    pass: Cell<Pass>,
    /// At the end the base takes the active layer's place.
    pivots: Cell<bool>,
    site: Site,
    job: Rc<Job>,
}

impl ActiveCommit {
    fn mirror(&self) -> &MirrorTop {
        match self.filter.driver_as() {
            Some(mirror) => mirror,
            None => unreachable!("the filter of an active commit is a mirror_top node"),
        }
    }

    async fn follow(self: Rc<Self>) -> Result<()> {
        let job = &self.job;
        let weak = Rc::downgrade(job);
        self.mirror().on_dirty(Some(Rc::new(move |bytes| {
            if let Some(job) = weak.upgrade() {
                job.add_total(bytes);
                job.look_again();
            }
        })));
        self.mark_allocated().await?;
        loop {
            let crew = Crew::new(job, ErrorPolicies::both(self.arguments.on_error));
            crew.work_off(self.clone(), &self.pace).await?;
            if job.is_cancelled() {
                return Ok(());
            }
            if !self.mirror().is_clean() {
                continue;
            }
            job.become_ready();
            if self.is_told_to_end() {
                return self.end_in_step().await;
            }
            job.until_told(|| !self.mirror().is_clean()).await;
            if self.is_told_to_end() {
                // However much is written from now on, no more becomes dirty.
                self.mirror().set_mode(CopyMode::WriteBlocking);
            }
        }
    }

    fn is_told_to_end(&self) -> bool {
        let job = &self.job;
        let told = job.is_completing() || job.is_cancelled_softly();
        told && !job.is_paused()
    }

    /// All is copied, and what is written goes to both.
    async fn end_in_step(&self) -> Result<()> {
        self.pivots.set(!self.job.is_cancelled_softly());
        let _passage = self.gate.enter().await;
        self.mirror().target().flush().await
    }

    /// What a layer above the base has is to be copied.
    async fn mark_allocated(&self) -> Result<()> {
        let Commit { top, base, .. } = &self.arguments;
        let size = top.size();
        let mut start = 0;
        while start < size && !self.job.is_cancelled() {
            let _passage = self.gate.enter().await;
            let rest = ByteRange::between(start, size);
            let status = status_above(top, Some(base), rest).await?;
            let next = start + status.extent.length;
            if status.depth > 0 {
                self.mirror().mark(ByteRange::between(start, next));
            }
            start = next;
        }
        Ok(())
    }

    fn find(&self) -> Option<ByteRange> {
        let most = if self.job.speed() > 0 {
            LIMITED_PIECE
        } else {
            self.pace.piece_length()
        };
        let mirror = self.mirror();
        let found = mirror.take(self.cursor.get(), most).or_else(|| {
            self.begin_pass();
            mirror.take(0, most)
        })?;
        self.cursor.set(found.end());
        Some(found)
    }

    /// The end of the disk was reached: does copying get ahead of the guest?
    fn begin_pass(&self) {
        let mirror = self.mirror();
        let (before, dirty) = (self.pass.get(), mirror.dirty_bytes());
        if dirty == 0 {
            self.pass.set(Pass::default());
            return;
        }
        let in_vain = if dirty > before.dirty / 2 {
            before.in_vain + 1
        } else {
            0
        };
        let passes = before.passes + 1;
        self.pass.set(Pass {
            dirty,
            in_vain,
            passes,
        });
        let converges = in_vain <= MOST_IN_VAIN && passes <= MOST_PASSES;
        if !converges && mirror.mode() == CopyMode::Background {
            tracing::info!(
                job = self.job.id(),
                dirty,
                "the guest writes faster than is copied: its writes go to both from now on"
            );
            mirror.set_mode(CopyMode::WriteBlocking);
        }
    }

    async fn copy(&self, piece: ByteRange) -> Result<(), CopyError> {
        let mirror = self.mirror();
        let _passage = self.gate.enter().await;
        let _held = mirror.hold(piece).await;
        let (from, to) = (mirror.source(), mirror.target());
        self.copier.copy(from, to, piece).await
    }

    /// The base takes the active layer's place.
    async fn pivot(&self) -> Result<()> {
        let base = &self.arguments.base;
        let graph = &self.workshop.graph;
        let drained = graph.drain(&[self.filter.clone(), base.clone()]).await?;
        self.catch_up().await?;
        self.mirror().target().flush().await?;
        let mut users = self.filter.parents();
        users.retain(|edge| edge.follows());
        graph.redirect(&drained, &users, base)?;
        self.site.leave_writable(base);
        Ok(())
    }

    /// A write to both may have failed at the base; nobody writes now.
    async fn catch_up(&self) -> Result<()> {
        let mirror = self.mirror();
        while let Some(piece) = mirror.take(0, self.pace.piece_length()) {
            let copied = self.copier.copy(mirror.source(), mirror.target(), piece);
            if let Err(failure) = copied.await {
                mirror.mark(piece);
                return Err(failure.error().duplicate());
            }
            self.ended(piece);
        }
        Ok(())
    }
}

impl Pieces for ActiveCommit {
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

impl Work for ActiveCommit {
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
            self.mirror().on_dirty(None);
            self.site.restore().await;
        })
    }

    fn change_copy_mode(&self, mode: CopyMode) -> Result<()> {
        let mirror = self.mirror();
        if mode == CopyMode::Background && mirror.mode() == CopyMode::WriteBlocking {
            let message = "Change to copy mode 'background' is not implemented";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        mirror.set_mode(mode);
        Ok(())
    }

    fn ends_well_when_cancelled_ready(&self) -> bool {
        true
    }
}

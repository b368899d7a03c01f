//! `backup`: copies what a node holds at the start of the job to a target, while its guest goes on.
//!
//! A copy-before-write filter above the node saves what a guest is about to change; the job copies the
//! rest, each part held by the filter meanwhile. A backup that has not come to its end is none: what the
//! target holds counts when the job has flushed it. The guest's data is nowhere but in the node, however
//! the job ends.

use std::cell::Cell;
use std::rc::Rc;

use super::copy::{Copier, CopyError, CopyOptions, Pace};
use super::pieces::{Crew, Pieces};
use super::site::Site;
use super::{ErrorPolicies, Job, JobKind, JobOptions, LocalFuture, Work, Workshop};
use crate::block::{Child, ExtentKind, Node, Permission, Permissions, Role};
use crate::error::{Error, Result};
use crate::filter::{CbwOptions, CopyBeforeWrite, Snapshot, SnapshotEvent};
use crate::range::ByteRange;

/// Which parts a backup copies by itself. What a guest is about to change it always does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// All.
    Full,
    /// What the node itself has; the target has the node's backing file below.
    Top,
    /// None: until it is cancelled, the target has what has changed, with the node itself below.
    Nothing,
}

/// How a backup goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupPerformance {
    /// Parts of files may be copied inside the kernel.
    pub use_copy_range: bool,
    /// Most pieces in flight.
    pub max_workers: usize,
    /// Most bytes in a piece; 0 is no limit.
    pub max_chunk: u64,
}

impl Default for BackupPerformance {
    fn default() -> BackupPerformance {
        BackupPerformance {
            use_copy_range: true,
            max_workers: 64,
            max_chunk: 0,
        }
    }
}

/// Arguments of a backup.
pub struct Backup {
    /// What every job has.
    pub job: JobOptions,
    /// The node whose content is copied.
    pub source: Rc<Node>,
    /// Where it goes.
    pub target: Rc<Node>,
    /// Which parts.
    pub sync: BackupSync,
    /// What is done about I/O errors of the job's own copies.
    pub on_error: ErrorPolicies,
    /// What is done where a guest's change has to wait for too long, or what it replaces cannot be saved.
    pub saving: CbwOptions,
    /// Data is stored compressed; the target can.
    pub compress: bool,
    /// What has been copied is discarded in the source.
    pub discard_source: bool,
    /// How it goes about it.
    pub performance: BackupPerformance,
    /// Name of the filter; without one it is not shown to users.
    pub filter_node_name: Option<String>,
}

/// Bytes that are held at once.
const MOST_HELD: u64 = 1 << 20;

/// Bytes in a piece at most where a speed limit pays for each.
const LIMITED_PIECE: u64 = 512 << 10;

/// Starts a backup.
///
/// # Errors
/// In QEMU's words; nothing has changed.
pub async fn backup(workshop: &Workshop, arguments: Backup) -> Result<Rc<Job>> {
    let (source, target) = (&arguments.source, &arguments.target);
    source.check_unoccupied()?;
    target.check_unoccupied()?;
    if source.size() != target.size() {
        return Err(Error::refused(
            "Source and target image have different sizes",
        ));
    }
    let site = Site::new(workshop, JobKind::Backup, &arguments.job.id);
    match set_up(workshop, &site, &arguments).await {
        Ok((job, filter, gate)) => {
            let most = arguments.performance.max_workers;
            let pace = Pace::new(workshop.jobs.handle(), gate.clone(), Vec::new());
            let snapshot = filter_of(&filter).snapshot().clone();
            let work = BackupWork {
                workshop: workshop.clone(),
                pace: pace.at_most(most),
                copier: Copier::new(copy_options(&arguments)),
                cursor: Cell::new(0),
                arguments,
                snapshot,
                filter,
                gate,
                site,
                job: job.clone(),
            };
            let work = Rc::new(work);
            work.follow();
            workshop.jobs.start(&job, work);
            Ok(job)
        }
        Err(error) => {
            site.restore().await;
            Err(error)
        }
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

async fn set_up(
    workshop: &Workshop,
    site: &Site,
    arguments: &Backup,
) -> Result<(Rc<Job>, Rc<Node>, Rc<Child>)> {
    let filter = put_filter(workshop, site, arguments).await?;
    let cluster = filter_of(&filter).snapshot().cluster_size();
    let chunk = arguments.performance.max_chunk;
    if chunk != 0 && chunk < cluster {
        return Err(Error::refused(format!(
            "Required max-chunk ({chunk}) is less than backup cluster size ({cluster})"
        )));
    }
    let job = workshop
        .jobs
        .create(JobKind::Backup, arguments.job.clone())?;
    match hold(workshop, site, arguments, &filter) {
        Ok(gate) => Ok((job, filter, gate)),
        Err(error) => {
            claim(workshop, &filter, Permission::empty());
            workshop.jobs.give_up(&job);
            Err(error)
        }
    }
}

async fn put_filter(workshop: &Workshop, site: &Site, arguments: &Backup) -> Result<Rc<Node>> {
    let Backup { source, target, .. } = arguments;
    let name = arguments.filter_node_name.as_deref();
    let children = [(Role::File, source), (Role::Target, target)];
    let context = |error: Error| error.context("Could not create node");
    arguments.saving.check().map_err(context)?;
    let handle = workshop.jobs.handle();
    let put = site.put_filter(name, &children, |edges| {
        let (file, target) = (edges[0].clone(), edges[1].clone());
        let filter = CopyBeforeWrite::new(handle, file, target, arguments.saving);
        filter.snapshot().set_compressed(arguments.compress);
        Box::new(filter)
    });
    put.await.map_err(context)
}

/// The edge through which the job's pieces pass. From now on nobody changes the source past the filter,
/// also where nobody else uses it.
fn hold(
    workshop: &Workshop,
    site: &Site,
    arguments: &Backup,
    filter: &Rc<Node>,
) -> Result<Rc<Child>> {
    let gate = site.hold(Role::MainNode, filter, Permissions::NONE)?;
    site.hold(Role::Target, &arguments.target, Permissions::NONE)?;
    let mut claimed = Permission::CONSISTENT_READ;
    claimed.set(Permission::WRITE, arguments.discard_source);
    filter_of(filter).claim(claimed);
    workshop
        .graph
        .refresh_permissions(std::slice::from_ref(filter))?;
    Ok(gate)
}

/// The filter needs this of the source, besides what its users need.
fn claim(workshop: &Workshop, filter: &Rc<Node>, claimed: Permission) {
    filter_of(filter).claim(claimed);
    let refreshed = workshop
        .graph
        .refresh_permissions(std::slice::from_ref(filter));
    if let Err(error) = refreshed {
        tracing::error!(node = filter.name(), %error, "permissions after a backup");
    }
}

fn filter_of(node: &Node) -> &CopyBeforeWrite {
    match node.driver_as() {
        Some(filter) => filter,
        None => unreachable!("the filter of a backup is a copy-before-write node"),
    }
}

struct BackupWork {
    workshop: Workshop,
    arguments: Backup,
    filter: Rc<Node>,
    snapshot: Rc<Snapshot>,
    gate: Rc<Child>,
    copier: Copier,
    pace: Pace,
    /// Where to look for something to copy next.
    cursor: Cell<u64>,
    site: Site,
    job: Rc<Job>,
}

impl BackupWork {
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
            BackupSync::Full => {}
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
            snapshot.set_saved(run);
            self.job.advance(run.length());
            if self.arguments.discard_source
                && let Err(error) = from.discard(run).await
            {
                tracing::debug!(job = self.job.id(), %run, %error, "not discarded in the source");
            }
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

    fn clean(&self, _succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(async {
            self.snapshot.on_event(None);
            claim(&self.workshop, &self.filter, Permission::empty());
            self.site.restore().await;
        })
    }
}

/// The part of a range that lies within so many bytes; at least one byte.
fn within(range: ByteRange, size: u64) -> ByteRange {
    ByteRange::between(range.start(), range.end().min(size.max(range.start() + 1)))
}

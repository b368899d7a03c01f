//! `commit` of layers that nobody writes: pushes what is above the base, up to `top`, into the base, then
//! drops the layers from `top` down to it.
//!
//! The base changes only where a layer above hides it, so that the chain shows the same at every instant.
//! At the end the base is flushed, then the overlay's header names it, then the graph follows.

use std::rc::Rc;

use super::chain::{attached_below, check_no_other_reader, layers, overlay_of};
use super::copy::{Copier, CopyError, CopyOptions, Pace};
use super::link::Link;
use super::pieces::Crew;
use super::site::Site;
use super::stretch::{Copying, Stretch};
use super::{ErrorPolicies, ErrorPolicy, Job, JobKind, JobOptions, LocalFuture, Work, Workshop};
use crate::block::{Child, Node, Permission, Permissions, Role, status_above};
use crate::error::Result;
use crate::filter::{CommitTop, CopyMode};
use crate::range::ByteRange;

/// Arguments of a commit.
pub struct Commit {
    /// What every job has.
    pub job: JobOptions,
    /// The active layer of the chain.
    pub device: Rc<Node>,
    /// The highest layer that is committed.
    pub top: Rc<Node>,
    /// Where it is committed to.
    pub base: Rc<Node>,
    /// What the overlay's header gets instead of the base's name.
    pub backing_file: Option<String>,
    /// The header calls a protocol node `raw`.
    pub mask_protocol: bool,
    /// What is done about I/O errors.
    pub on_error: ErrorPolicy,
    /// What happens to a guest's writes meanwhile, where the active layer is committed.
    pub copy_mode: CopyMode,
    /// Name of the filter; without one it is not shown to users.
    pub filter_node_name: Option<String>,
}

/// Of the layers that are committed: they show mixed content to whoever would look at them alone.
pub(super) const MIXED: Permissions = Permissions {
    required: Permission::empty(),
    shared: Permission::WRITE.union(Permission::WRITE_UNCHANGED),
};

/// Of the job's I/O to the base.
const WRITER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ.union(Permission::WRITE),
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};

/// Starts a commit of layers below the active one.
///
/// # Errors
/// In QEMU's words; nothing has changed.
pub async fn commit(workshop: &Workshop, arguments: Commit) -> Result<Rc<Job>> {
    let committed = layers(&arguments.top, Some(&arguments.base));
    check_no_other_reader(&committed, &arguments.base)?;
    let job = workshop
        .jobs
        .create(JobKind::Commit, arguments.job.clone())?;
    let site = Site::new(workshop, JobKind::Commit, &arguments.job.id);
    let edges = set_up(&site, &arguments, &committed).await;
    let Edges { guest, from, to } = site.begin(&job, edges).await?;
    let work = CommitWork {
        workshop: workshop.clone(),
        pace: Rc::new(Pace::new(workshop.jobs.handle(), guest, Vec::new())),
        copier: Copier::new(CopyOptions::default()),
        arguments,
        from,
        to,
        site,
    };
    workshop.jobs.start(&job, Rc::new(work));
    Ok(job)
}

/// The job's own edges.
struct Edges {
    /// To the active layer, to see what the guest does.
    guest: Rc<Child>,
    from: Rc<Child>,
    to: Rc<Child>,
}

async fn set_up(site: &Site, arguments: &Commit, committed: &[Rc<Node>]) -> Result<Edges> {
    let Commit {
        device, top, base, ..
    } = arguments;
    open_base(site, arguments).await?;
    let name = arguments.filter_node_name.as_deref();
    let children = [(Role::Backing, top)];
    let put = site.put_filter(name, &children, |edges| {
        Box::new(CommitTop::new(edges[0].clone()))
    });
    put.await?;
    let guest = site.hold(Role::MainNode, device, Permissions::NONE)?;
    for layer in committed {
        site.hold(Role::IntermediateNode, layer, MIXED)?;
    }
    site.hold(Role::Base, base, Permissions::NONE)?;
    let to = site.reach(base, WRITER)?;
    let from = site.reach(top, Permissions::NONE)?;
    Ok(Edges { guest, from, to })
}

/// Makes the base writable, and as long as what is committed into it.
pub(super) async fn open_base(site: &Site, arguments: &Commit) -> Result<()> {
    let Commit { top, base, .. } = arguments;
    site.open_for_writing(base).await?;
    if base.size() < top.size() {
        site.grow(base, top.size()).await?;
    }
    Ok(())
}

struct CommitWork {
    workshop: Workshop,
    arguments: Commit,
    from: Rc<Child>,
    to: Rc<Child>,
    copier: Copier,
    pace: Rc<Pace>,
    site: Site,
}

impl CommitWork {
    async fn push(self: Rc<Self>, job: &Rc<Job>) -> Result<()> {
        let size = self.shown_size();
        job.set_total(size);
        let stretch = Stretch::new(job, self.clone(), &self.pace, size);
        let policies = ErrorPolicies::both(self.arguments.on_error);
        let crew = Crew::new(job, policies);
        crew.work_off(Rc::new(stretch), &self.pace).await?;
        // What is left for the last step is little then.
        self.to.flush().await
    }

    /// Bytes that who is above will see of the base. A longer base comes to light beyond the end of `top`,
    /// where there were zeroes.
    fn shown_size(&self) -> u64 {
        let Commit {
            device, top, base, ..
        } = &self.arguments;
        let above = overlay_of(top, device).map_or(0, |overlay| overlay.size());
        top.size().max(above.min(base.size()))
    }

    async fn link(&self) -> Result<()> {
        self.to.flush().await?;
        // A writer of the base is in the way of who reads it from above.
        self.site.leave(&self.to).await;
        let Commit {
            device, top, base, ..
        } = &self.arguments;
        let Some(overlay) = overlay_of(top, device) else {
            unreachable!("a commit of the active layer is another job");
        };
        let link = Link {
            backing_file: self.arguments.backing_file.clone(),
            mask_protocol: self.arguments.mask_protocol,
        };
        let attached = attached_below(&layers(top, Some(base)));
        link.make(&self.workshop, &overlay, attached.as_ref()).await
    }
}

impl Copying for CommitWork {
    /// What a layer between has is copied, and so is what is zeroes only because a layer is too short.
    fn look(&self, range: ByteRange) -> LocalFuture<'_, Result<(bool, u64)>> {
        Box::pin(async move {
            let _passage = self.from.enter().await;
            let Commit { top, base, .. } = &self.arguments;
            let status = status_above(top, Some(base), range).await?;
            Ok((status.depth > 0, status.extent.length))
        })
    }

    fn copy(&self, range: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        Box::pin(self.copier.copy(&self.from, &self.to, range))
    }

    fn retries(&self) -> bool {
        true
    }
}

impl Work for CommitWork {
    fn run(self: Rc<Self>, job: Rc<Job>) -> LocalFuture<'static, Result<()>> {
        Box::pin(async move { self.push(&job).await })
    }

    fn prepare(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.link())
    }

    fn clean(&self, _succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(self.site.restore())
    }
}

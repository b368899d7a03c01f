//! `commit` of the active layer: pushes everything above the base into it while a guest writes, then
//! follows the guest until it is told to complete (the base takes the active layer's place) or to end.
//!
//! The base changes only where a layer above hides it, so that the chain shows the same at every instant,
//! and no header is changed at all.

use std::rc::Rc;

use super::chain::{check_no_other_reader, layers};
use super::commit::{Commit, MIXED, open_base};
use super::mirror::{Course, DEFAULT_BUFFER, Follower, Outset, Post, post};
use super::site::Site;
use super::{ErrorPolicies, Job, JobKind, Workshop};
use crate::block::{Child, Node, Role};
use crate::error::Result;
use crate::filter::{MirrorOptions, Place};

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
    let posted = set_up(&site, &arguments, &committed).await;
    let (filter, gate) = site.begin(&job, posted).await?;
    let post = Post { filter, gate, site };
    let work = Follower::new(workshop, &job, course(arguments), post);
    workshop.jobs.start(&job, Rc::new(work));
    Ok(job)
}

async fn set_up(
    site: &Site,
    arguments: &Commit,
    committed: &[Rc<Node>],
) -> Result<(Rc<Node>, Rc<Child>)> {
    let Commit { top, base, .. } = arguments;
    open_base(site, arguments).await?;
    let options = MirrorOptions {
        place: Place::Below,
        granularity: base.default_granularity(),
        only_whole: false,
    };
    let name = arguments.filter_node_name.as_deref();
    let posted = post(site, name, top, base, options).await?;
    for layer in committed.iter().skip(1) {
        site.hold(Role::IntermediateNode, layer, MIXED)?;
    }
    Ok(posted)
}

fn course(arguments: Commit) -> Course {
    let Commit {
        top,
        base,
        on_error,
        copy_mode,
        ..
    } = arguments;
    Course {
        outset: Outset::Allocated(Some(base.clone())),
        source: top,
        target: base,
        same_size: false,
        on_error: ErrorPolicies::both(on_error),
        copy_mode,
        buffer: DEFAULT_BUFFER,
        unmap: true,
        replaced: None,
        becomes_backing: false,
    }
}

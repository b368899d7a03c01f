//! `mirror`: copies what a device shows to another node while a guest writes it, then follows the guest
//! until it is told to complete (the target takes the device's place) or to end (the target stays what the
//! device was at that instant).
//!
//! A [`Follower`] does it, also for a commit of the active layer, whose target is the base. What is to be
//! copied at first is its [`Outset`].
//!
//! Invariants:
//! - Who reads the target after the last step reads all that was answered before it.
//! - A job that fails or is cancelled has changed nothing but the target.

mod follower;
mod outset;
mod pass;

use std::rc::Rc;

use super::site::Site;
use super::{ErrorPolicies, Job, JobKind, JobOptions, Workshop};
use crate::block::{Child, DiscardMode, Node, Permission, Permissions, Role};
use crate::error::{Error, Result};
use crate::filter::{CopyMode, MirrorOptions, MirrorTop, Place};

pub(super) use follower::{Follower, Post};
pub(super) use outset::Outset;

/// Bytes in flight at most where nothing else is said.
pub(super) const DEFAULT_BUFFER: u64 = 16 << 20;

/// How much of a device is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// All that it shows.
    Full,
    /// What its top layer has, and what is written.
    Top,
    /// What is written from now on.
    None,
}

/// What is known of the target before it is copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// It may hold anything.
    Unknown,
    /// It reads as zeroes.
    Zero,
}

/// Arguments of a mirror.
pub struct Mirror {
    /// What every job has.
    pub job: JobOptions,
    /// What is copied: a node that only users are above.
    pub device: Rc<Node>,
    /// Where it is copied to.
    pub target: Rc<Node>,
    /// How much of it.
    pub sync: SyncMode,
    /// What the target gets as its backing file before anything is written to it. Its header says so.
    pub backing: Option<Rc<Node>>,
    /// What the target holds.
    pub before: Before,
    /// The node whose users the target gets in the end; the device without one.
    pub replaces: Option<Rc<Node>>,
    /// Bytes that one dirty bit stands for: 512 to 64 MiB, a power of two; without it as the target likes.
    pub granularity: Option<u64>,
    /// Bytes in flight at most; 0 is the default.
    pub buffer: u64,
    /// Zeroes may take space away from the target.
    pub unmap: bool,
    /// What is done about I/O errors.
    pub on_error: ErrorPolicies,
    /// What happens to a guest's writes meanwhile.
    pub copy_mode: CopyMode,
    /// Name of the filter; without one it is not shown to users.
    pub filter_node_name: Option<String>,
}

/// Starts a mirror.
///
/// # Errors
/// In QEMU's words; nothing has changed. A target of another size is an error of the job.
pub async fn mirror(workshop: &Workshop, arguments: Mirror) -> Result<Rc<Job>> {
    if Rc::ptr_eq(&arguments.device, &arguments.target) {
        let message = "Can't mirror node into itself";
        return Err(Error::refused(message));
    }
    if let Some(name) = &arguments.filter_node_name {
        workshop.images.check_node_name(name)?;
    }
    let job = workshop
        .jobs
        .create(JobKind::Mirror, arguments.job.clone())?;
    let site = Site::new(workshop, JobKind::Mirror, &arguments.job.id);
    let posted = set_up(workshop, &site, &arguments).await;
    let (filter, gate) = site.begin(&job, posted).await?;
    let post = Post { filter, gate, site };
    let work = Follower::new(workshop, &job, course(arguments), post);
    workshop.jobs.start(&job, Rc::new(work));
    Ok(job)
}

async fn set_up(
    workshop: &Workshop,
    site: &Site,
    arguments: &Mirror,
) -> Result<(Rc<Node>, Rc<Child>)> {
    let Mirror { device, target, .. } = arguments;
    // Says in QEMU's words who is in the way of a target that nobody else may use.
    let probe = site.reach(target, TARGETED)?;
    site.leave(&probe).await;
    let is_overlay = |backing: &Rc<Node>| Rc::ptr_eq(backing, device);
    // Of a cluster that is written in part the target would miss the rest.
    let only_whole = arguments.backing.is_none() && workshop.images.lacks_backing(target);
    let cluster = cluster_of(target);
    let chosen = arguments.granularity;
    let granularity = chosen.unwrap_or_else(|| target.default_granularity());
    let options = MirrorOptions {
        place: match &arguments.backing {
            Some(backing) if is_overlay(backing) => Place::Above,
            _ => Place::Apart,
        },
        granularity: match only_whole {
            true => granularity.max(cluster),
            false => granularity,
        },
        only_whole,
    };
    let name = arguments.filter_node_name.as_deref();
    let posted = post(site, name, device, target, options).await?;
    if let Some(backing) = &arguments.backing {
        attach_backing(workshop, target, backing).await?;
    }
    if let Some(replaced) = &arguments.replaces {
        site.hold(Role::IntermediateNode, replaced, Permissions::NONE)?;
    }
    Ok(posted)
}

async fn attach_backing(workshop: &Workshop, target: &Rc<Node>, backing: &Rc<Node>) -> Result<()> {
    let graph = &workshop.graph;
    let drained = graph.drain(std::slice::from_ref(target)).await?;
    graph.set_backing(&drained, target, Some(backing))?;
    drop(drained);
    workshop.images.backing_changed(target);
    Ok(())
}

fn course(arguments: Mirror) -> Course {
    let below = arguments.device.backing();
    let outset = match (arguments.sync, arguments.before) {
        (SyncMode::None, _) => Outset::Nothing,
        (SyncMode::Top, _) if below.is_some() => Outset::Allocated(below),
        (SyncMode::Top | SyncMode::Full, Before::Zero) => Outset::Allocated(None),
        _ if arguments.target.options().discard == DiscardMode::Unmap => Outset::Zeroed,
        _ => Outset::Everything,
    };
    let becomes_backing = arguments
        .backing
        .as_ref()
        .is_some_and(|backing| Rc::ptr_eq(backing, &arguments.device));
    Course {
        outset,
        becomes_backing,
        source: arguments.device,
        target: arguments.target,
        same_size: true,
        on_error: arguments.on_error,
        copy_mode: arguments.copy_mode,
        buffer: match arguments.buffer {
            0 => DEFAULT_BUFFER,
            buffer => buffer,
        },
        unmap: arguments.unmap,
        replaced: arguments.replaces,
    }
}

/// What a job that follows copies, and what becomes of it.
pub(super) struct Course {
    pub(super) source: Rc<Node>,
    pub(super) target: Rc<Node>,
    /// The job fails where the sizes of the two differ.
    pub(super) same_size: bool,
    pub(super) outset: Outset,
    pub(super) on_error: ErrorPolicies,
    pub(super) copy_mode: CopyMode,
    /// Bytes in flight at most.
    pub(super) buffer: u64,
    /// Zeroes may take space away from the target.
    pub(super) unmap: bool,
    /// Whose users go to the target in the end, instead of the device's.
    pub(super) replaced: Option<Rc<Node>>,
    /// The source is the target's backing file: it turns read-only in the end.
    pub(super) becomes_backing: bool,
}

/// Others may use the source, and nobody resizes it.
const FOLLOWED: Permissions = Permissions {
    required: Permission::empty(),
    shared: Permission::all().difference(Permission::RESIZE),
};

/// Of a target that lies apart: nobody else reads or writes it.
const TARGETED: Permissions = Permissions {
    required: Permission::WRITE,
    shared: Permission::WRITE_UNCHANGED,
};

/// Of the job's I/O, through the filter.
const FOLLOWER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ,
    shared: FOLLOWED.shared,
};

/// Puts the filter above the source and keeps others off both ends.
///
/// # Errors
/// The name is malformed or taken; permissions are in the way.
pub(super) async fn post(
    site: &Site,
    name: Option<&str>,
    source: &Rc<Node>,
    target: &Rc<Node>,
    options: MirrorOptions,
) -> Result<(Rc<Node>, Rc<Child>)> {
    let children = [(Role::Backing, source), (Role::Target, target)];
    let put = site.put_filter(name, &children, |edges| {
        let (child, target) = (edges[0].clone(), edges[1].clone());
        Box::new(MirrorTop::new(child, target, options))
    });
    let filter = put.await?;
    let gate = site.hold(Role::MainNode, &filter, FOLLOWER)?;
    site.hold(Role::Source, source, FOLLOWED)?;
    site.hold(Role::Target, target, Permissions::NONE)?;
    Ok((filter, gate))
}

fn cluster_of(target: &Node) -> u64 {
    u64::from(target.driver().limits().optimal_transfer)
}

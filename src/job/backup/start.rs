//! The moment of a backup: alone, or one with other changes in a transaction.

use std::cell::RefCell;
use std::rc::Rc;

use super::Backup;
use super::tracking::Tracking;
use super::work::{BackupWork, Place};
use crate::block::{Action, Child, DrainedSection, IoFuture, Node, Permission, Permissions, Role};
use crate::error::{Error, Result};
use crate::filter::CopyBeforeWrite;
use crate::job::site::Site;
use crate::job::{Job, JobGroup, JobKind, Workshop};

/// A backup whose job is there and whose filter is not in use yet. Its moment is when it is made, as an
/// [`Action`]; it runs when that is settled.
pub struct PreparedBackup {
    workshop: Workshop,
    job: Rc<Job>,
    filter: Rc<Node>,
    parts: RefCell<Option<Parts>>,
    held: RefCell<Option<Held>>,
}

/// What the work needs.
struct Parts {
    arguments: Backup,
    site: Site,
}

/// What is held from the moment on.
struct Held {
    gate: Rc<Child>,
    tracking: Option<Tracking>,
}

impl PreparedBackup {
    /// Everything that takes long. Who prepares it makes a transaction of it. Jobs of one group end
    /// together.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed.
    pub async fn prepare(
        workshop: &Workshop,
        arguments: Backup,
        group: Option<&Rc<JobGroup>>,
    ) -> Result<PreparedBackup> {
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
            Ok((job, filter)) => {
                if let Some(group) = group {
                    group.add(&job);
                }
                Ok(PreparedBackup {
                    workshop: workshop.clone(),
                    job,
                    filter,
                    parts: RefCell::new(Some(Parts { arguments, site })),
                    held: RefCell::default(),
                })
            }
            Err(error) => {
                site.restore().await;
                Err(error)
            }
        }
    }

    /// The job, which does nothing yet.
    pub fn job(&self) -> &Rc<Job> {
        &self.job
    }

    /// The moment: nothing is in flight.
    fn make_now(&self, drained: &DrainedSection) -> Result<()> {
        let parts = self.parts.borrow();
        let Some(Parts { arguments, site }) = &*parts else {
            unreachable!("a backup is made before it is settled");
        };
        // An action before this one in a transaction may have taken the node, or made the bitmap.
        arguments.source.check_unoccupied()?;
        let bitmap = match &arguments.bitmap {
            Some(wanted) => Some((wanted, wanted.find(&arguments.source)?)),
            None => None,
        };
        let graph = &self.workshop.graph;
        graph.put_in(drained, &self.filter)?;
        let held = hold(&self.workshop, site, arguments, &self.filter).and_then(|gate| {
            let track = |(wanted, bitmap)| Tracking::begin(wanted, &bitmap, arguments.sync);
            let tracking = bitmap.map(track).transpose()?;
            Ok(Held { gate, tracking })
        });
        match held {
            Ok(held) => {
                if let Some(selected) = held.tracking.as_ref().and_then(Tracking::selected) {
                    filter_of(&self.filter).snapshot().restrict(&selected);
                }
                *self.held.borrow_mut() = Some(held);
                Ok(())
            }
            Err(error) => {
                self.take_out(drained)?;
                Err(error)
            }
        }
    }

    fn take_out(&self, drained: &DrainedSection) -> Result<()> {
        if let Some(tracking) = self.held.take().and_then(|held| held.tracking) {
            tracking.not_copied();
        }
        release(&self.workshop, &self.filter);
        self.workshop.graph.take_out(drained, &self.filter)
    }

    async fn run_or_go(&self, made: bool) {
        let Some(Parts { arguments, site }) = self.parts.take() else {
            unreachable!("a backup is settled once");
        };
        let jobs = &self.workshop.jobs;
        match self.held.take().filter(|_| made) {
            Some(held) => {
                let place = Place {
                    filter: self.filter.clone(),
                    snapshot: filter_of(&self.filter).snapshot().clone(),
                    gate: held.gate,
                    tracking: held.tracking,
                };
                let work = BackupWork::new(&self.workshop, &self.job, arguments, place, site);
                jobs.start(&self.job, work);
            }
            None => {
                site.restore().await;
                jobs.abort(&self.job);
            }
        }
    }
}

impl Action for PreparedBackup {
    fn nodes(&self) -> Vec<Rc<Node>> {
        let parts = self.parts.borrow();
        let sources = parts.iter().map(|parts| parts.arguments.source.clone());
        sources.collect()
    }

    fn make<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(async { self.make_now(drained) })
    }

    fn undo<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(async { self.take_out(drained) })
    }

    fn settle(&self, made: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.run_or_go(made).await;
            Ok(())
        })
    }
}

async fn set_up(
    workshop: &Workshop,
    site: &Site,
    arguments: &Backup,
) -> Result<(Rc<Job>, Rc<Node>)> {
    let filter = make_filter(workshop, site, arguments).await?;
    let cluster = filter_of(&filter).snapshot().cluster_size();
    let chunk = arguments.performance.max_chunk;
    if chunk != 0 && chunk < cluster {
        return Err(Error::refused(format!(
            "Required max-chunk ({chunk}) is less than backup cluster size ({cluster})"
        )));
    }
    let options = arguments.job.clone();
    let job = workshop.jobs.create(JobKind::Backup, options)?;
    Ok((job, filter))
}

async fn make_filter(workshop: &Workshop, site: &Site, arguments: &Backup) -> Result<Rc<Node>> {
    let Backup { source, target, .. } = arguments;
    let name = arguments.filter_node_name.as_deref();
    let children = [(Role::File, source), (Role::Target, target)];
    let context = |error: Error| error.context("Could not create node");
    arguments.saving.check().map_err(context)?;
    let handle = workshop.jobs.handle();
    let made = site.make_filter(name, &children, |edges| {
        let (file, target) = (edges[0].clone(), edges[1].clone());
        let filter = CopyBeforeWrite::new(handle, file, target, arguments.saving);
        filter.snapshot().set_compressed(arguments.compress);
        Box::new(filter)
    });
    made.await.map_err(context)
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
    claim(workshop, filter, claimed)?;
    Ok(gate)
}

/// The filter needs no more of the source than its users do.
pub(super) fn release(workshop: &Workshop, filter: &Rc<Node>) {
    if let Err(error) = claim(workshop, filter, Permission::empty()) {
        tracing::error!(node = filter.name(), %error, "permissions after a backup");
    }
}

/// The filter needs this of the source, besides what its users need.
fn claim(workshop: &Workshop, filter: &Rc<Node>, claimed: Permission) -> Result<()> {
    filter_of(filter).claim(claimed);
    let filter = std::slice::from_ref(filter);
    workshop.graph.refresh_permissions(filter)
}

fn filter_of(node: &Node) -> &CopyBeforeWrite {
    match node.driver_as() {
        Some(filter) => filter,
        None => unreachable!("the filter of a backup is a copy-before-write node"),
    }
}

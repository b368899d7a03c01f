//! `stream`: pulls what lies between a node and its base into the node, then drops what lies between.
//!
//! A copy-on-read filter above the node keeps guest writes and copies apart: a piece is held while it is
//! looked at and copied, so that a guest write to it comes before or after. At the end the node's data is
//! flushed, then its header names the base, then the graph follows.

use std::rc::Rc;

use super::chain::{attached_below, check_unoccupied, layers};
use super::copy::{Copier, CopyError, CopyOptions, Pace};
use super::link::Link;
use super::pieces::Crew;
use super::site::Site;
use super::stretch::{Copying, Stretch};
use super::{ErrorPolicies, ErrorPolicy, Job, JobKind, JobOptions, LocalFuture, Work, Workshop};
use crate::block::{Child, Node, Permission, Permissions, Role, status_above};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{CopyOnRead, GuestReads};
use crate::range::ByteRange;

/// Arguments of a stream.
pub struct Stream {
    /// What every job has.
    pub job: JobOptions,
    /// The node that is filled.
    pub device: Rc<Node>,
    /// The node that stays below it; `None`: nothing does.
    pub base: Option<Rc<Node>>,
    /// What the header gets instead of the base's name.
    pub backing_file: Option<String>,
    /// The header calls a protocol node `raw`.
    pub mask_protocol: bool,
    /// What is done about I/O errors.
    pub on_error: ErrorPolicy,
    /// Name of the filter; without one it is not shown to users.
    pub filter_node_name: Option<String>,
}

/// Bytes that are held at once.
const MOST_HELD: u64 = 1 << 20;

/// Others may read the layers that are streamed, and nobody changes them.
const FROZEN: Permissions = Permissions {
    required: Permission::empty(),
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};

/// Of the job's I/O, through the filter.
const PULLER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ,
    shared: FILLED.shared,
};

/// Others may use the node that is filled, and nobody resizes it.
const FILLED: Permissions = Permissions {
    required: Permission::empty(),
    shared: Permission::all().difference(Permission::RESIZE),
};

/// Starts a stream.
///
/// # Errors
/// In QEMU's words; nothing has changed.
pub async fn stream(workshop: &Workshop, arguments: Stream) -> Result<Rc<Job>> {
    let device = &arguments.device;
    let above = layers(device, arguments.base.as_ref());
    check_unoccupied(device, arguments.base.as_ref())?;
    if arguments.backing_file.is_some() && arguments.base.is_none() {
        let message = "backing file specified, but streaming the entire chain";
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    let site = Site::new(workshop, JobKind::Stream, &arguments.job.id);
    let ready = async {
        site.open_for_writing(device).await?;
        let filter = put_filter(&site, &arguments, &above).await?;
        let job = workshop
            .jobs
            .create(JobKind::Stream, arguments.job.clone())?;
        match hold(&site, &filter, &above) {
            Ok(gate) => Ok((job, filter, gate)),
            Err(error) => {
                workshop.jobs.give_up(&job);
                Err(error)
            }
        }
    };
    match ready.await {
        Ok((job, filter, gate)) => {
            let work = StreamWork {
                workshop: workshop.clone(),
                nothing: above.len() == 1,
                pace: Rc::new(Pace::new(workshop.jobs.handle(), gate.clone(), Vec::new())),
                copier: Copier::new(CopyOptions::default()),
                above,
                arguments,
                filter,
                gate,
                site,
            };
            workshop.jobs.start(&job, Rc::new(work));
            Ok(job)
        }
        Err(error) => {
            site.restore().await;
            Err(error)
        }
    }
}

async fn put_filter(site: &Site, arguments: &Stream, above: &[Rc<Node>]) -> Result<Rc<Node>> {
    let bottom = above.last().cloned();
    let name = arguments.filter_node_name.as_deref();
    let children = [(Role::File, &arguments.device)];
    let put = site.put_filter(name, &children, |edges| {
        let file = edges[0].clone();
        Box::new(CopyOnRead::new(file, bottom, GuestReads::PassBy))
    });
    put.await
        .map_err(|error| error.context("Could not create node"))
}

/// The edge through which the job's pieces pass.
fn hold(site: &Site, filter: &Rc<Node>, above: &[Rc<Node>]) -> Result<Rc<Child>> {
    let gate = site.reach(filter, PULLER)?;
    site.hold(Role::MainNode, filter, Permissions::NONE)?;
    let mut layers = above.iter();
    if let Some(device) = layers.next() {
        site.hold(Role::ActiveNode, device, FILLED)?;
    }
    for layer in layers {
        site.hold(Role::IntermediateNode, layer, FROZEN)?;
    }
    Ok(gate)
}

struct StreamWork {
    workshop: Workshop,
    arguments: Stream,
    /// The layers that are streamed, the node first. What stays below them another job may commit meanwhile.
    above: Vec<Rc<Node>>,
    filter: Rc<Node>,
    gate: Rc<Child>,
    /// There is no layer between the node and its base.
    nothing: bool,
    copier: Copier,
    pace: Rc<Pace>,
    site: Site,
}

impl StreamWork {
    /// What stays below the node as the graph is now, with the filters above it.
    fn base(&self) -> Option<Rc<Node>> {
        let base = self.arguments.base.as_ref();
        base.and_then(|_| attached_below(&self.above))
    }

    async fn fill(self: Rc<Self>, job: &Rc<Job>) -> Result<()> {
        if self.nothing {
            return Ok(());
        }
        let size = self.arguments.device.size();
        job.set_total(size);
        let stretch = Stretch::new(job, self.clone(), &self.pace, size);
        let policies = ErrorPolicies::both(self.arguments.on_error);
        let crew = Crew::new(job, policies);
        let ignored = crew.work_off(Rc::new(stretch), &self.pace).await?;
        match ignored {
            Some(error) => Err(error),
            // What is left for the last step is little then.
            None => self.gate.flush().await,
        }
    }

    /// Whether the start of the range is stored between the node and its base, not in the node.
    async fn is_missing(&self, range: ByteRange) -> Result<(bool, u64)> {
        let base = self.base();
        let status = status_above(&self.arguments.device, base.as_ref(), range).await?;
        Ok((status.depth > 1, status.extent.length))
    }

    /// A piece is held in parts, each no longer than a guest's write may wait for.
    async fn copy_piece(&self, piece: ByteRange) -> Result<(), CopyError> {
        let mut start = piece.start();
        while start < piece.end() {
            let part = ByteRange::between(start, piece.end().min(start + MOST_HELD));
            self.copy_held(part).await?;
            start = part.end();
        }
        Ok(())
    }

    async fn copy_held(&self, range: ByteRange) -> Result<(), CopyError> {
        let Some(filter) = self.filter.driver_as::<CopyOnRead>() else {
            unreachable!("the filter of a stream is a copy-on-read node");
        };
        let _passage = self.gate.enter().await;
        let _held = filter.hold(range).await;
        let Some(from) = self.arguments.device.child(Role::Backing) else {
            return Ok(());
        };
        let to = filter.file();
        let mut start = range.start();
        while start < range.end() {
            let rest = ByteRange::between(start, range.end());
            let (missing, length) = self.is_missing(rest).await.map_err(CopyError::Read)?;
            if missing {
                let piece = ByteRange::between(start, start + length);
                let copied = self.copier.copy(&from, &to, piece).await;
                copied.map_err(CopyError::into_read)?;
            }
            start += length;
        }
        Ok(())
    }

    async fn link(&self) -> Result<()> {
        self.gate.flush().await?;
        let (device, base) = (&self.arguments.device, self.base());
        let link = Link {
            backing_file: self.arguments.backing_file.clone(),
            mask_protocol: self.arguments.mask_protocol,
        };
        link.make(&self.workshop, device, base.as_ref()).await
    }
}

impl Copying for StreamWork {
    fn look(&self, range: ByteRange) -> LocalFuture<'_, Result<(bool, u64)>> {
        Box::pin(async move {
            let _passage = self.gate.enter().await;
            self.is_missing(range).await
        })
    }

    fn copy(&self, range: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        Box::pin(self.copy_piece(range))
    }

    fn retries(&self) -> bool {
        false
    }
}

impl Work for StreamWork {
    fn run(self: Rc<Self>, job: Rc<Job>) -> LocalFuture<'static, Result<()>> {
        Box::pin(async move { self.fill(&job).await })
    }

    fn ends_at_once(&self) -> bool {
        self.nothing
    }

    fn prepare(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.link())
    }

    fn clean(&self, _succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(self.site.restore())
    }
}

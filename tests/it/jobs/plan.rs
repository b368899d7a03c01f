//! Random chains, and jobs on them as the daemon's commands start them.

use std::rc::Rc;

use liveblk::block::{Node, Permissions, Role};
use liveblk::buffer::MemorySlice;
use liveblk::error::{Error, ErrorKind, Result};
use liveblk::filter::CopyMode;
use liveblk::job::{
    Before, Commit, ErrorPolicies, ErrorPolicy, Job, JobOptions, Mirror, Stream, SyncMode,
    check_unoccupied, commit, commit_active, mirror, stream,
};
use liveblk::testing::{Model, Random, Workload, WorkloadOptions, attach};

use super::stage::{Kind, Stage, Stored, World, format_of};
use crate::chain::Geometry;
use crate::compressed::compress_some;

/// What a random chain is like.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) kinds: Vec<Kind>,
    pub(crate) sizes: Vec<u64>,
    pub(crate) requests: u64,
    pub(crate) compresses: bool,
}

impl Chain {
    pub(crate) fn draw(random: &mut Random, layers: u64) -> Chain {
        let raw_base = random.percent(30);
        let size = 512 * (200 + random.below(1200));
        let differing = random.percent(40);
        let mut kinds = Vec::new();
        let mut sizes = Vec::new();
        for depth in 0..layers {
            kinds.push(match depth == 0 && raw_base {
                true => Kind::Raw,
                false => Kind::Qcow2(Geometry::draw(random)),
            });
            sizes.push(match differing && random.percent(60) {
                true => size / 1024 * 512 + 512 * random.below(size / 512),
                false => size,
            });
        }
        Chain {
            kinds,
            sizes,
            requests: 10 + random.below(60),
            compresses: random.percent(30),
        }
    }

    pub(crate) fn has_raw(&self) -> bool {
        self.kinds.iter().any(|kind| matches!(kind, Kind::Raw))
    }

    /// Makes the images, one on top of the other, and fills them; answers the content of the top one.
    pub(crate) async fn build(&self, world: &World) -> (Vec<Stored>, Vec<u8>) {
        let mut random = Random::new(world.seed ^ 0xbeef);
        let mut stored: Vec<Stored> = Vec::new();
        let mut content = Vec::new();
        for (depth, (kind, size)) in self.kinds.iter().zip(&self.sizes).enumerate() {
            let name = format!("layer{depth}");
            let below = stored.last();
            let backing = below.map(|below| (below.name.as_str(), format_of(&below.kind)));
            let image = world.create(&name, kind, *size, backing, 50 + depth as u64);
            let image = image.await;
            stored.push(Stored {
                name: name.clone(),
                kind: kind.clone(),
                store: image.disk.store(),
            });
            let stage = Stage::open(world, stored.clone(), &name).await;
            let stage = stage.expect("what was made can be opened");
            content.resize(*size as usize, 0);
            let workload = workload(&stage, &content, world.seed ^ (depth as u64) << 40, 4);
            workload.run(self.requests).await;
            workload.verify().await;
            content = whole(&stage).await.expect("no fault");
            stage.close().await.expect("no fault");
            stored = stage.stored();
            if self.compresses && matches!(kind, Kind::Qcow2(_)) {
                let image = &mut stored[depth];
                image.store = compress_some(&image.store, &mut random);
            }
        }
        (stored, content)
    }
}

/// Requests to the guest's disk, which holds these bytes.
pub(crate) fn workload(stage: &Stage, content: &[u8], seed: u64, depth: u32) -> Workload {
    let options = WorkloadOptions {
        depth,
        longest: 32 << 10,
        ..WorkloadOptions::default()
    };
    let model = Model::from_bytes(content);
    Workload::new(
        &stage.world.handle,
        stage.guest.clone(),
        model,
        options,
        seed,
    )
}

/// All that the guest can read.
pub(crate) async fn whole(stage: &Stage) -> Result<Vec<u8>> {
    let buffer = MemorySlice::zeroed(stage.guest.node().size() as usize);
    stage.guest.read(0, buffer.clone().into()).await?;
    Ok(buffer.to_vec())
}

/// A job, by the numbers of layers: 0 is the active one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// `device` gets what is between it and `base`.
    Stream { device: usize, base: Option<usize> },
    /// What is from `top` down to `base` goes to `base`.
    Commit { top: usize, base: usize },
    /// The device goes to a new image.
    Mirror { sync: SyncMode, copy_mode: CopyMode },
}

/// The mirrors that there are.
pub(crate) const MIRRORS: [Plan; 4] = [
    copied(SyncMode::Full, CopyMode::Background),
    copied(SyncMode::Full, CopyMode::WriteBlocking),
    copied(SyncMode::Top, CopyMode::Background),
    copied(SyncMode::None, CopyMode::WriteBlocking),
];

pub(crate) const fn copied(sync: SyncMode, copy_mode: CopyMode) -> Plan {
    Plan::Mirror { sync, copy_mode }
}

impl Plan {
    /// Any job on a chain of so many layers, at least 2.
    pub(crate) fn draw(random: &mut Random, layers: usize) -> Plan {
        let upper = random.below(layers as u64 - 1) as usize;
        let lower = upper + 1 + random.below((layers - upper - 1) as u64) as usize;
        match random.below(7) {
            0 => Plan::Stream {
                device: upper,
                base: None,
            },
            5 | 6 => random.choose(&MIRRORS),
            1 | 2 => Plan::Stream {
                device: upper,
                base: Some(lower),
            },
            _ => Plan::Commit {
                top: upper,
                base: lower,
            },
        }
    }

    /// The layer that is written; a mirror writes none.
    pub(crate) fn target(self) -> Option<usize> {
        match self {
            Plan::Stream { device, .. } => Some(device),
            Plan::Commit { base, .. } => Some(base),
            Plan::Mirror { .. } => None,
        }
    }

    /// What the header of a mirror's target names as its backing file.
    pub(crate) fn backing(self, stage: &Stage) -> Option<Rc<Node>> {
        match self {
            Plan::Mirror {
                sync: SyncMode::None,
                ..
            } => Some(stage.active()),
            Plan::Mirror {
                sync: SyncMode::Top,
                ..
            } => stage.active().backing(),
            _ => None,
        }
    }

    fn base(self) -> Option<usize> {
        match self {
            Plan::Stream { base, .. } => base,
            Plan::Commit { base, .. } => Some(base),
            Plan::Mirror { .. } => None,
        }
    }

    fn upper(self) -> usize {
        match self {
            Plan::Stream { device, .. } => device,
            Plan::Commit { top, .. } => top,
            Plan::Mirror { .. } => 0,
        }
    }

    /// It is over only when somebody says so.
    pub(crate) fn follows(self) -> bool {
        matches!(self, Plan::Commit { top: 0, .. } | Plan::Mirror { .. })
    }
}

/// What every job of a test has.
pub(crate) fn options(id: &str) -> JobOptions {
    JobOptions {
        id: id.to_owned(),
        speed: 0,
        auto_finalize: true,
        auto_dismiss: true,
    }
}

/// Starts a job as the daemon's commands do.
///
/// # Errors
/// What the command would say.
pub(crate) async fn start(
    stage: &Stage,
    plan: Plan,
    job: JobOptions,
    on_error: ErrorPolicy,
) -> Result<Rc<Job>> {
    start_named(stage, plan, job, on_error, None).await
}

pub(crate) async fn start_named(
    stage: &Stage,
    plan: Plan,
    job: JobOptions,
    on_error: ErrorPolicy,
    filter_node_name: Option<String>,
) -> Result<Rc<Job>> {
    let _turn = stage.changes.lock().await;
    let layers = stage.layers();
    let layer = |index: usize| layers[index].clone();
    if plan.upper().max(plan.base().unwrap_or(0)) >= layers.len() {
        return Err(Error::new(
            ErrorKind::InUse,
            "the chain was shorter meanwhile",
        ));
    }
    match plan {
        Plan::Stream { device, base } => {
            let arguments = Stream {
                job,
                device: layer(device),
                base: base.map(layer),
                backing_file: None,
                mask_protocol: false,
                on_error,
                filter_node_name,
            };
            stream(&stage.workshop, arguments).await
        }
        Plan::Commit { top, base } => {
            let arguments = Commit {
                job,
                device: layer(0),
                top: layer(top),
                base: layer(base),
                backing_file: None,
                mask_protocol: false,
                on_error,
                copy_mode: CopyMode::default(),
                filter_node_name,
            };
            check_commit(&arguments)?;
            match top {
                0 => commit_active(&stage.workshop, arguments).await,
                _ => commit(&stage.workshop, arguments).await,
            }
        }
        Plan::Mirror { sync, copy_mode } => {
            check_root(&layer(0))?;
            layer(0).check_unoccupied()?;
            let backing = plan.backing(stage);
            let target = stage.open_target(backing.as_ref()).await?;
            let hold = attach(&stage.graph, &target, Permissions::NONE);
            let arguments = Mirror {
                copy_mode,
                filter_node_name,
                on_error: ErrorPolicies::both(on_error),
                ..mirror_of(&layer(0), &target, sync, backing, job)
            };
            let started = mirror(&stage.workshop, arguments).await;
            stage.graph.detach(&hold).await?;
            started
        }
    }
}

/// A mirror into an image that was made for it.
pub(crate) fn mirror_of(
    device: &Rc<Node>,
    target: &Rc<Node>,
    sync: SyncMode,
    backing: Option<Rc<Node>>,
    job: JobOptions,
) -> Mirror {
    Mirror {
        job,
        device: device.clone(),
        target: target.clone(),
        sync,
        backing,
        before: Before::Zero,
        replaces: None,
        granularity: None,
        buffer: 0,
        unmap: true,
        on_error: ErrorPolicies::default(),
        copy_mode: CopyMode::default(),
        filter_node_name: None,
    }
}

fn check_root(device: &Rc<Node>) -> Result<()> {
    if device
        .parents()
        .iter()
        .all(|edge| edge.role() == Role::Root)
    {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InUse, "Need a root block node"))
}

fn check_commit(arguments: &Commit) -> Result<()> {
    let Commit {
        device, top, base, ..
    } = arguments;
    check_root(device)?;
    device.check_unoccupied()?;
    check_unoccupied(top, Some(base))?;
    base.check_unoccupied()
}

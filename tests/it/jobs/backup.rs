//! A backup equals the device at its start, whatever its guest and its users do meanwhile, what fails, and when
//! power goes away; and the guest's own data never suffers.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use liveblk::block::{Child, Node, Permission, Permissions, WriteFlags};
use liveblk::buffer::MemorySlice;
use liveblk::error::Result;
use liveblk::filter::{CbwOptions, OnCbwError};
use liveblk::job::{
    Backup, BackupPerformance, BackupSync, ErrorPolicies, ErrorPolicy, Job, Status, backup,
};
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, SimulatedDisk, Workload,
    WorkloadOptions, attach, for_each_seed, simulate,
};

use super::plan::{Chain, options, whole};
use super::stage::{Image, Kind, Stage, Stored, World, open_one};
use crate::chain::{Geometry, check_disk};
use crate::crashes;

/// What a backup is made with.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    sync: BackupSync,
    policy: ErrorPolicy,
    saving: CbwOptions,
    performance: BackupPerformance,
    compress: bool,
    discard_source: bool,
}

const SYNCS: [BackupSync; 3] = [BackupSync::Full, BackupSync::Top, BackupSync::Nothing];

impl Wanted {
    fn draw(random: &mut Random, sync: BackupSync) -> Wanted {
        let min_cluster_size = random.choose(&[0, 0, 1 << 17, 1 << 20]);
        let max_chunk = random.choose(&[0, 0, 3 << 20, 5_000_000]);
        Wanted {
            sync,
            policy: ErrorPolicy::Report,
            saving: CbwOptions {
                min_cluster_size,
                timeout: random.choose(&[None, Some(Duration::from_secs(600))]),
                ..CbwOptions::default()
            },
            performance: BackupPerformance {
                use_copy_range: random.percent(50),
                max_workers: random.choose(&[1, 2, 64]),
                max_chunk,
            },
            compress: random.percent(30),
            discard_source: false,
        }
    }
}

/// A chain with a guest, and an image to back it up to.
struct Trial {
    stage: Stage,
    workload: Workload,
    target: Image,
    node: Rc<Node>,
    /// What the device held when nothing was in flight.
    before: Vec<u8>,
}

impl Trial {
    async fn new(world: &World, chain: &Chain, wanted: &Wanted, errors: &[Errno]) -> Trial {
        let (stored, content) = chain.build(world).await;
        let active = stored[stored.len() - 1].name.clone();
        let stage = Stage::open(world, stored, &active).await;
        let stage = stage.expect("it was closed");
        let mut random = Random::new(world.seed ^ 0xbacc);
        let workload_options = WorkloadOptions {
            depth: random.choose(&[2, 4, 8]),
            longest: random.choose(&[16 << 10, 200 << 10]),
            tolerated: errors.to_vec(),
            ..WorkloadOptions::default()
        };
        let model = Model::from_bytes(&content);
        let guest = stage.guest.clone();
        let seed = world.seed ^ 0xba;
        let workload = Workload::new(&world.handle, guest, model, workload_options, seed);
        workload.run(20).await;
        let before = whole(&stage).await.expect("no fault");
        let (target, node) = open_target(&stage, &mut random, wanted.sync).await;
        Trial {
            stage,
            workload,
            target,
            node,
            before,
        }
    }

    async fn start(&self, wanted: &Wanted) -> Result<Rc<Job>> {
        let _turn = self.stage.changes.lock().await;
        let arguments = Backup {
            job: options("backup"),
            source: self.stage.guest.node(),
            target: self.node.clone(),
            sync: wanted.sync,
            on_error: ErrorPolicies::both(wanted.policy),
            saving: wanted.saving,
            bitmap: None,
            compress: wanted.compress && self.node.driver().compresses(),
            discard_source: wanted.discard_source,
            performance: wanted.performance,
            filter_node_name: None,
        };
        backup(&self.stage.workshop, arguments).await
    }

    /// What is read through the target.
    async fn saved(&self) -> Vec<u8> {
        let reader = Permissions {
            required: Permission::CONSISTENT_READ,
            ..Permissions::NONE
        };
        let edge = attach(&self.stage.graph, &self.node, reader);
        let bytes = read_all(&edge).await;
        self.stage.graph.detach(&edge).await.expect("no fault");
        bytes
    }

    async fn assert_is_backup(&self, when: &str) {
        let saved = self.saved().await;
        let wrong = saved.iter().zip(&self.before).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{when}: {:?}", self.stage.names());
    }

    /// The target goes, and nothing of the backup is left.
    async fn drop_target(&self, when: &str) {
        self.node.set_monitor_owned(false);
        // A disk that failed may not take the last writes.
        let _ = self.stage.graph.release(&self.node).await;
        self.stage.assert_at_rest(when);
    }
}

async fn open_target(stage: &Stage, random: &mut Random, sync: BackupSync) -> (Image, Rc<Node>) {
    let active = stage.active();
    let below = match sync {
        BackupSync::Full | BackupSync::Bitmap => None,
        BackupSync::Top => active.backing(),
        BackupSync::Nothing => Some(active.clone()),
    };
    let kind = match below.is_none() && random.percent(30) {
        true => Kind::Raw,
        false => Kind::Qcow2(Geometry::draw(random)),
    };
    let backing = below
        .as_ref()
        .map(|node| (node.name(), node.driver().driver_name()));
    let size = active.size();
    let image = stage.world.create("target", &kind, size, backing, 77).await;
    let opened = open_one(&stage.graph, &image, below.as_ref(), false).await;
    let node = opened.expect("a valid image");
    node.set_monitor_owned(true);
    (image, node)
}

async fn read_all(edge: &Rc<Child>) -> Vec<u8> {
    let bytes = MemorySlice::zeroed(edge.node().size() as usize);
    edge.read(0, bytes.clone().into()).await.expect("no fault");
    bytes.to_vec()
}

fn world(handle: &Handle, power: &Power, seed: u64, chain: &Chain) -> World {
    let mut random = Random::new(seed ^ 0x3031);
    World {
        handle: handle.clone(),
        power: power.clone(),
        disk: DiskOptions {
            request_alignment: random.choose(&[1, 512]),
            native_fua: random.percent(50),
            write_zeroes: random.percent(70),
            garbles_discards: !chain.has_raw(),
            ..DiskOptions::default()
        },
        seed,
    }
}

/// Pauses, goes on, slower and faster.
async fn meddle(job: Rc<Job>, handle: Handle, mut random: Random) {
    for _ in 0..random.below(12) {
        handle
            .sleep(Duration::from_micros(random.below(2000)))
            .await;
        let _ = match random.below(4) {
            0 => job.pause(),
            1 => job.set_speed(1 << (16 + random.below(8))),
            2 => job.set_speed(0),
            _ => job.resume(),
        };
    }
    let _ = job.set_speed(0);
    let _ = job.resume();
}

#[test]
fn a_backup_is_the_device_at_its_start() {
    for_each_seed("a_backup_is_the_device_at_its_start", 45, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let layers = 1 + random.below(3);
            let chain = Chain::draw(&mut random, layers);
            let world = world(&handle, &Power::new(), seed, &chain);
            let wanted = Wanted::draw(&mut random, SYNCS[seed as usize % 3]);
            let trial = Trial::new(&world, &chain, &wanted, &[]).await;
            let job = trial.start(&wanted).await.expect("nothing is in the way");
            let others = meddle(job.clone(), handle.clone(), Random::new(random.next_u64()));
            let others = handle.spawn(others);
            trial.workload.run(40 + random.below(150)).await;
            others.await;
            if wanted.sync == BackupSync::Nothing {
                trial.assert_is_backup("while it goes on").await;
                trial.workload.run(20).await;
                trial.assert_is_backup("while it still goes on").await;
                job.cancel(true).expect("it runs");
            }
            job.until_over().await;
            let failure = job.error();
            assert_eq!(
                failure.is_some(),
                wanted.sync == BackupSync::Nothing,
                "{failure:?}"
            );
            trial.workload.verify().await;
            if wanted.sync != BackupSync::Nothing {
                let progress = job.progress();
                assert_eq!(progress.current, progress.total);
                trial.assert_is_backup("at the end").await;
                trial.workload.run(30).await;
                trial.assert_is_backup("after the end").await;
            }
            trial.drop_target("after the backup").await;
            let stage = &trial.stage;
            trial.workload.verify().await;
            stage.close().await.expect("no fault");
            stage.assert_sound(false, "after closing").await;
            if let Kind::Qcow2(_) = trial.target.kind {
                let checked = check_disk(&trial.target.disk).await.expect("a header");
                assert!(checked.is_clean(), "{checked:#?}");
            }
        });
    });
}

/// A cancelled backup gives everything back, at any moment.
#[test]
fn a_cancelled_backup_leaves_nothing_behind() {
    for_each_seed("a_cancelled_backup", 20, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let chain = Chain::draw(&mut random, 2);
            let world = world(&handle, &Power::new(), seed, &chain);
            let wanted = Wanted::draw(&mut random, SYNCS[seed as usize % 2]);
            let trial = Trial::new(&world, &chain, &wanted, &[]).await;
            let picture = trial.stage.picture();
            let job = trial.start(&wanted).await.expect("nothing is in the way");
            let guest = trial.workload.clone();
            let guest = handle.spawn(async move { guest.run(50).await });
            handle
                .sleep(Duration::from_micros(random.below(3000)))
                .await;
            let _ = job.cancel(true);
            job.until_over().await;
            guest.await;
            assert_eq!(trial.stage.picture(), picture);
            trial.workload.verify().await;
            trial.drop_target("after the cancel").await;
            trial.stage.close().await.expect("no fault");
        });
    });
}

/// Writes a sector after a while, with what tells it from all others.
async fn write_sector(handle: Handle, guest: Rc<Child>, sector: u64, after: Duration) {
    handle.sleep(after).await;
    let bytes = MemorySlice::from_bytes(&(sector + 1).to_le_bytes().repeat(64));
    let written = guest.write(sector * 512, bytes.into(), WriteFlags::empty());
    written.await.expect("no fault");
}

/// A part that was copied was discarded when guests could write to it again: what one wrote in between was gone.
#[test]
fn discards_in_the_source_spare_what_guests_write() {
    for_each_seed("discards_in_the_source", 24, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let chain = Chain::draw(&mut random, 1);
            let world = world(&handle, &Power::new(), seed, &chain);
            let mut wanted = Wanted::draw(&mut random, BackupSync::Full);
            wanted.discard_source = true;
            let trial = Trial::new(&world, &chain, &wanted, &[]).await;
            let job = trial.start(&wanted).await.expect("nothing is in the way");
            let sectors = trial.before.len() as u64 / 512;
            let written: Vec<u64> = (0..sectors).filter(|_| random.percent(40)).collect();
            let start = |sector: &u64| {
                let after = Duration::from_micros(random.below(4000));
                let guest = trial.stage.guest.clone();
                handle.spawn(write_sector(handle.clone(), guest, *sector, after))
            };
            let writers: Vec<_> = written.iter().map(start).collect();
            for writer in writers {
                writer.await;
            }
            job.until_over().await;
            assert_eq!(job.error(), None);
            trial
                .assert_is_backup("of a source that is discarded")
                .await;
            let now = whole(&trial.stage).await.expect("no fault");
            for sector in written {
                let bytes = (sector + 1).to_le_bytes().repeat(64);
                let place = sector as usize * 512;
                assert!(now[place..place + 512] == bytes, "{place:#x} is lost");
            }
            trial.drop_target("after the backup").await;
            trial.stage.close().await.expect("no fault");
        });
    });
}

/// Which disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// Leads a job to its end; where it was stopped by an error it is resumed.
async fn lead(handle: &Handle, job: &Rc<Job>) {
    for _ in 0..20_000 {
        match job.status() {
            Status::Concluded | Status::Null => return,
            Status::Paused => job.resume().expect("it is paused"),
            _ => {}
        }
        handle.sleep(Duration::from_micros(300)).await;
    }
    panic!("the job does not end: {:?}", job.status());
}

/// True: the fault struck.
fn fail_once(seed: u64, side: Side, fault: Fault, wanted: Wanted) -> bool {
    simulate(seed, |handle| async move {
        let mut random = Random::new(seed);
        let mut chain = Chain::draw(&mut random, 2);
        chain.requests = 20;
        let world = world(&handle, &Power::new(), seed, &chain);
        let errors = [Errno::EIO, Errno::ENOSPC];
        let trial = Trial::new(&world, &chain, &wanted, &errors).await;
        let disk: SimulatedDisk = match side {
            Side::Source => trial.stage.disk(trial.stage.active().name()),
            Side::Target => trial.target.disk.clone(),
        };
        disk.fail(fault);
        let guest = trial.workload.clone();
        let job = match trial.start(&wanted).await {
            Ok(job) => {
                let guest = handle.spawn(async move { guest.run(30).await });
                lead(&handle, &job).await;
                guest.await;
                Some(job)
            }
            Err(_) => None,
        };
        let struck = disk.faults_struck() > 0;
        disk.heal();
        trial.workload.verify().await;
        let failed = job.is_none_or(|job| job.error().is_some());
        assert!(struck || !failed, "it failed without a fault");
        if wanted.saving.on_error == OnCbwError::BreakSnapshot && side == Side::Target {
            assert_eq!(trial.workload.failures(), 0, "the guest has noticed");
        }
        if !failed {
            trial.assert_is_backup("after a fault").await;
        }
        trial.drop_target("after a fault").await;
        trial.workload.run(20).await;
        trial.workload.verify().await;
        struck
    })
}

const KINDS: [DiskOperation; 4] = [
    DiskOperation::Read,
    DiskOperation::Write,
    DiskOperation::WriteZeroes,
    DiskOperation::Flush,
];

/// Fails operations of each kind on either side, ever later, until a run is clean.
fn sweep_faults(seed: u64, wanted: Wanted) {
    for side in [Side::Source, Side::Target] {
        for kind in KINDS {
            let errno = [Errno::EIO, Errno::ENOSPC][seed as usize % 2];
            let mut nth = seed % 3;
            while nth < 50 && fail_once(seed, side, Fault::once(&[kind], nth, errno), wanted) {
                nth += 5;
            }
        }
    }
}

#[test]
fn a_fault_anywhere_in_a_backup_harms_nothing() {
    let policies = [ErrorPolicy::Report, ErrorPolicy::Stop, ErrorPolicy::Ignore];
    for_each_seed("a_fault_anywhere_in_a_backup", 1, |seed| {
        for (index, policy) in policies.into_iter().enumerate() {
            for on_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
                let seed = seed * 10 + index as u64;
                let mut wanted = Wanted::draw(&mut Random::new(seed), SYNCS[index % 2]);
                wanted.policy = policy;
                wanted.saving.on_error = on_error;
                sweep_faults(seed, wanted);
            }
        }
    });
}

/// What a crash left.
struct Left {
    stored: Vec<Stored>,
    active: String,
    model: Model,
    target: Stored,
    before: Vec<u8>,
    operations: u64,
    /// The backup was told to be complete.
    complete: bool,
}

fn crash_at(seed: u64, wanted: Wanted, operation: Option<u64>) -> Left {
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let mut random = Random::new(seed);
    let mut chain = Chain::draw(&mut random, 2);
    chain.requests = 10;
    let world = world(&handle, &power, seed, &chain);
    let trial = runtime.block_on(Trial::new(&world, &chain, &wanted, &[]));
    let trial = Rc::new(trial);
    let begun = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    let complete = Rc::new(Cell::new(false));
    let (doing, done) = (trial.clone(), complete.clone());
    let doings = async move {
        let job = doing.start(&wanted).await.expect("nothing is in the way");
        let guest = doing.workload.clone();
        let guest = handle.spawn(async move { guest.run(60).await });
        job.until_over().await;
        assert_eq!(job.error(), None);
        done.set(true);
        guest.await;
        doing.workload.run(15).await;
        doing.workload.flush().await;
    };
    runtime.block_on(power.run(doings));
    let mut random = Random::new(seed ^ operation.unwrap_or(0) << 20);
    let model = trial.workload.model().clone();
    Left {
        stored: trial.stage.crash(&mut random),
        active: trial.stage.active().name().to_owned(),
        model,
        target: Stored {
            name: trial.target.name.clone(),
            kind: trial.target.kind.clone(),
            store: trial.target.disk.crash(&mut random),
        },
        before: trial.before.clone(),
        operations: power.operations() - begun,
        complete: complete.get(),
    }
}

/// The guest's data is what it was promised, and a backup that was complete is there.
fn restart(seed: u64, left: Left) -> Result<(), String> {
    simulate(seed, |handle| async move {
        let world = World {
            handle,
            power: Power::new(),
            disk: DiskOptions::default(),
            seed,
        };
        let Left {
            stored,
            mut model,
            before,
            ..
        } = left;
        let stage = Stage::open(&world, stored.clone(), &left.active).await;
        let stage = stage.map_err(|error| format!("cannot be opened: {error}"))?;
        let mut bytes = whole(&stage).await.map_err(|error| error.to_string())?;
        bytes.truncate(model.size() as usize);
        let judged = model.check_after_crash(&bytes);
        judged.map_err(|mismatch| format!("the guest's: {mismatch}"))?;
        stage.close().await.map_err(|error| error.to_string())?;
        if !left.complete {
            return Ok(());
        }
        let mut images = stored;
        images.push(left.target);
        let stage = Stage::open(&world, images, "target").await;
        let stage = stage.map_err(|error| format!("the backup cannot be opened: {error}"))?;
        let saved = whole(&stage).await.map_err(|error| error.to_string())?;
        stage.close().await.map_err(|error| error.to_string())?;
        match saved == before {
            true => Ok(()),
            false => Err("the backup is not the device at its start".into()),
        }
    })
}

#[test]
fn power_fails_anywhere_in_a_backup() {
    for_each_seed("power_fails_anywhere_in_a_backup", 3, |seed| {
        for sync in [BackupSync::Full, BackupSync::Top] {
            let wanted = Wanted::draw(&mut Random::new(seed), sync);
            let left = crash_at(seed, wanted, None);
            assert!(left.complete, "the job does not end: {wanted:?}");
            let operations = left.operations;
            let points = crashes::points(seed, operations, 20);
            for operation in points.map(Some).chain([None]) {
                let left = crash_at(seed, wanted, operation);
                if let Err(wrong) = restart(seed, left) {
                    panic!("crash at {operation:?} of {operations}: {wrong}\n{wanted:?}");
                }
            }
        }
    });
}

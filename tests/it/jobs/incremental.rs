//! Chains of incremental backups: put on one another they are the device at the moment of the last one, whatever
//! the guest did, which of them failed or were cancelled, and when power went away.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use liveblk::block::{Bitmap, BitmapFlags, DirtyBitmap, Node, Permission, Permissions};
use liveblk::buffer::MemorySlice;
use liveblk::filter::{CbwOptions, OnCbwError};
use liveblk::job::{
    Backup, BackupBitmap, BackupPerformance, BackupSync, BitmapMode, ErrorPolicies, ErrorPolicy,
    Job, JobEvent, backup,
};
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Power, Random, Workload, attach, for_each_seed, simulate,
};

use super::plan::{Chain, options, whole, workload};
use super::stage::{Image, Kind, Stage, Stored, World, open_one};
use crate::chain::Geometry;
use crate::crashes;

const NAME: &str = "changes";

/// A device whose changes a bitmap records, and the backups that it has.
struct Series {
    stage: Stage,
    workload: Workload,
    bitmap: Rc<Bitmap>,
    /// Each on top of the one before; the last is what counts.
    backups: RefCell<Vec<Rc<Node>>>,
    made: RefCell<Vec<Image>>,
}

impl Series {
    async fn new(world: &World, random: &mut Random, chain: &Chain, flags: BitmapFlags) -> Series {
        let (stored, content) = chain.build(world).await;
        let active = stored[stored.len() - 1].name.clone();
        let stage = Stage::open(world, stored, &active).await;
        let stage = stage.expect("it was closed");
        let node = stage.active();
        let granularity = random.choose(&[512, 4096, 65536, 1 << 18]);
        let bits = DirtyBitmap::new(node.size(), granularity);
        let flags = flags | BitmapFlags::ENABLED;
        let bitmap = Rc::new(Bitmap::new(NAME, flags, bits));
        node.bitmaps().add(bitmap.clone());
        if let Some(store) = node.driver().bitmap_store()
            && flags.contains(BitmapFlags::PERSISTENT)
        {
            store.update().await.expect("no fault");
        }
        Series {
            workload: workload(&stage, &content, world.seed ^ 0xba, 4),
            stage,
            bitmap,
            backups: RefCell::default(),
            made: RefCell::default(),
        }
    }

    /// An empty image over the last backup.
    async fn new_target(&self, random: &mut Random) -> (Image, Rc<Node>) {
        let number = self.made.borrow().len() as u64;
        let name = format!("backup{number}");
        let below = self.backups.borrow().last().cloned();
        let backing = below
            .as_ref()
            .map(|node| (node.name(), node.driver().driver_name()));
        let kind = Kind::Qcow2(Geometry::draw(random));
        let (world, size) = (&self.stage.world, self.stage.active().size());
        let image = world
            .create(&name, &kind, size, backing, 300 + number)
            .await;
        self.made.borrow_mut().push(image.clone());
        let node = open_one(&self.stage.graph, &image, below.as_ref(), false).await;
        let node = node.expect("a valid image");
        node.set_monitor_owned(true);
        (image, node)
    }

    async fn start(&self, target: &Rc<Node>, mode: BitmapMode, random: &mut Random) -> Rc<Job> {
        let _turn = self.stage.changes.lock().await;
        // The first one has all.
        let sync = match self.backups.borrow().is_empty() {
            true => BackupSync::Full,
            false => BackupSync::Bitmap,
        };
        let arguments = Backup {
            job: options("backup"),
            source: self.stage.active(),
            target: target.clone(),
            sync,
            bitmap: Some(BackupBitmap {
                name: NAME.to_owned(),
                mode,
            }),
            on_error: ErrorPolicies::both(ErrorPolicy::Report),
            saving: CbwOptions {
                on_error: OnCbwError::BreakSnapshot,
                min_cluster_size: random.choose(&[0, 1 << 17]),
                ..CbwOptions::default()
            },
            compress: random.percent(30),
            discard_source: false,
            performance: BackupPerformance {
                max_workers: random.choose(&[1, 64]),
                ..BackupPerformance::default()
            },
            filter_node_name: None,
        };
        let job = backup(&self.stage.workshop, arguments).await;
        job.expect("nothing is in the way")
    }

    /// One more backup, with a guest beside it; it may be cancelled, or its target may fail. True: it counts.
    async fn one_more(&self, random: &mut Random, before: &[u8]) -> bool {
        let is_first = self.backups.borrow().is_empty();
        let mut mode = random.choose(&[BitmapMode::OnSuccess, BitmapMode::Always]);
        if random.percent(20) && !is_first {
            mode = BitmapMode::Never;
        }
        let (image, target) = self.new_target(random).await;
        let dirty = self.bitmap.with_bits(DirtyBitmap::clone);
        if random.percent(20) {
            let fault = Fault::once(&[DiskOperation::Write], random.below(20), Errno::ENOSPC);
            image.disk.fail(fault);
        }
        let job = self.start(&target, mode, random).await;
        let canceller = random.percent(25).then(|| {
            let (job, handle) = (job.clone(), self.stage.world.handle.clone());
            let delay = Duration::from_micros(random.below(4000));
            self.stage.world.handle.spawn(async move {
                handle.sleep(delay).await;
                let _ = job.cancel(true);
            })
        });
        let idle = random.percent(30);
        if !idle {
            self.workload.run(20 + random.below(60)).await;
        }
        job.until_over().await;
        if let Some(canceller) = canceller {
            canceller.await;
        }
        image.disk.heal();
        let succeeded = job.error().is_none();
        assert!(!self.bitmap.is(BitmapFlags::BUSY));
        if idle {
            self.check_bits(&dirty, mode, succeeded, is_first);
        }
        // What failed but is accounted for stays below what comes next.
        let counts = succeeded || (mode == BitmapMode::Always && !is_first);
        match counts {
            true => self.backups.borrow_mut().push(target),
            false => self.drop_target(&target).await,
        }
        if succeeded {
            let newest = self.backups.borrow().last().cloned();
            let saved = read_all(&self.stage, &newest.expect("one was pushed")).await;
            let wrong = saved.iter().zip(before).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "backup {:?}", image.name);
        }
        succeeded
    }

    /// Nobody wrote meanwhile: what is dirty now is what the mode says.
    fn check_bits(&self, dirty: &DirtyBitmap, mode: BitmapMode, succeeded: bool, is_first: bool) {
        let now = self.bitmap.with_bits(DirtyBitmap::clone);
        match (mode, succeeded) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => assert_eq!(now, *dirty),
            (_, true) => assert!(now.is_clean(), "{mode:?}"),
            (BitmapMode::Always, false) if is_first => {}
            (BitmapMode::Always, false) => {
                let mut all = dirty.clone();
                all.merge(&now);
                assert_eq!(all, *dirty, "what was clean is dirty");
            }
        }
    }

    async fn drop_target(&self, target: &Rc<Node>) {
        target.set_monitor_owned(false);
        // A disk that failed may not take the last writes.
        let _ = self.stage.graph.release(target).await;
    }

    async fn end(&self) {
        let backups = self.backups.take();
        for target in backups.iter().rev() {
            target.set_monitor_owned(false);
            let released = self.stage.graph.release(target).await;
            released.expect("no fault");
        }
        self.stage.assert_at_rest("after all backups");
        self.workload.verify().await;
        self.stage.close().await.expect("no fault");
        self.stage.assert_sound(false, "after closing").await;
    }
}

async fn read_all(stage: &Stage, node: &Rc<Node>) -> Vec<u8> {
    let reader = Permissions {
        required: Permission::CONSISTENT_READ,
        ..Permissions::NONE
    };
    let edge = attach(&stage.graph, node, reader);
    let bytes = MemorySlice::zeroed(node.size() as usize);
    edge.read(0, bytes.clone().into()).await.expect("no fault");
    stage.graph.detach(&edge).await.expect("no fault");
    bytes.to_vec()
}

fn world(handle: &Handle, power: &Power, seed: u64, chain: &Chain) -> World {
    World {
        handle: handle.clone(),
        power: power.clone(),
        disk: DiskOptions {
            native_fua: seed.is_multiple_of(2),
            garbles_discards: !chain.has_raw(),
            ..DiskOptions::default()
        },
        seed,
    }
}

#[test]
fn chains_of_increments_are_the_device() {
    for_each_seed("chains_of_increments", 40, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let chain = Chain::draw(&mut random, 1 + seed % 3);
            let world = world(&handle, &Power::new(), seed, &chain);
            let series = Series::new(&world, &mut random, &chain, BitmapFlags::empty()).await;
            let mut succeeded = 0;
            for _ in 0..8 {
                series.workload.run(random.below(40)).await;
                let before = whole(&series.stage).await.expect("no fault");
                succeeded += u32::from(series.one_more(&mut random, &before).await);
            }
            assert!(succeeded > 0, "not one backup went well");
            series.end().await;
        });
    });
}

/// What a crash left: the device, and the content of the last backup that was told to be complete.
struct Left {
    stored: Vec<Stored>,
    active: String,
    complete: Option<Vec<u8>>,
    operations: u64,
}

/// Backups one after the other, none of which fails; power may.
async fn doings(series: Rc<Series>, seed: u64, complete: Rc<RefCell<Option<Vec<u8>>>>) {
    let mut random = Random::new(seed ^ 0x1c);
    let moment: Rc<RefCell<Vec<u8>>> = Rc::default();
    let newest = moment.clone();
    series.stage.workshop.jobs.on_event(move |event| {
        if matches!(event, JobEvent::Completed(..)) {
            *complete.borrow_mut() = Some(newest.take());
        }
    });
    for _ in 0..4 {
        series.workload.run(random.below(30)).await;
        *moment.borrow_mut() = whole(&series.stage).await.expect("no fault");
        let (_, target) = series.new_target(&mut random).await;
        let mode = random.choose(&[BitmapMode::OnSuccess, BitmapMode::Always]);
        let job = series.start(&target, mode, &mut random).await;
        series.workload.run(random.below(30)).await;
        job.until_over().await;
        assert_eq!(job.error(), None);
        series.backups.borrow_mut().push(target);
        if random.percent(50) {
            let store = series.stage.active();
            let store = store.driver().bitmap_store().expect("qcow2 stores bitmaps");
            store.update().await.expect("no fault");
        }
    }
    series.workload.flush().await;
}

fn crash_at(seed: u64, operation: Option<u64>, ignores_flush: bool) -> Left {
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let mut random = Random::new(seed);
    let mut chain = Chain::draw(&mut random, 2);
    chain.requests = 10;
    if let Kind::Qcow2(geometry) = &mut chain.kinds[1] {
        geometry.version = 3;
    }
    let mut world = world(&handle, &power, seed, &chain);
    world.disk.ignores_flush = ignores_flush;
    let series = Series::new(&world, &mut random, &chain, BitmapFlags::PERSISTENT);
    let series = Rc::new(runtime.block_on(series));
    let begun = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    let complete = Rc::default();
    runtime.block_on(power.run(doings(series.clone(), seed, Rc::clone(&complete))));
    let mut random = Random::new(seed ^ operation.unwrap_or(0) << 20);
    Left {
        stored: series.stage.crash(&mut random),
        active: series.stage.active().name().to_owned(),
        complete: complete.take(),
        operations: power.operations() - begun,
    }
}

/// The bitmap has all in which the device differs from its last backup: the next one brings it.
fn restart(seed: u64, left: Left) -> Result<(), String> {
    simulate(seed, |handle| async move {
        let world = World {
            handle,
            power: Power::new(),
            disk: DiskOptions::default(),
            seed,
        };
        let stage = Stage::open(&world, left.stored, &left.active).await;
        let stage = stage.map_err(|error| format!("cannot be opened: {error}"))?;
        let now = whole(&stage).await.map_err(|error| error.to_string())?;
        let bitmap = stage.active().bitmaps().find(NAME);
        let bitmap = bitmap.ok_or("the bitmap is lost")?;
        if bitmap.is(BitmapFlags::INCONSISTENT) {
            return Err("the bitmap is inconsistent".into());
        }
        let missed = left.complete.and_then(|complete| {
            let sectors = now.chunks(512).zip(complete.chunks(512)).enumerate();
            let changed = sectors.filter(|(_, (now, before))| now != before);
            let mut starts = changed.map(|(index, _)| index as u64 * 512);
            bitmap.with_bits(|bits| starts.find(|start| bits.next_dirty(*start) != Some(*start)))
        });
        stage.close().await.map_err(|error| error.to_string())?;
        match missed {
            None => Ok(()),
            Some(offset) => Err(format!("the next backup would miss {offset:#x}")),
        }
    })
}

/// Crashes spread over a run of backups.
fn sweep(seed: u64, ignores_flush: bool) -> Result<(), String> {
    let operations = crash_at(seed, None, ignores_flush).operations;
    let points = crashes::points(seed, operations, 30);
    for operation in points.map(Some).chain([None]) {
        let left = crash_at(seed, operation, ignores_flush);
        restart(seed, left)
            .map_err(|wrong| format!("crash at {operation:?} of {operations}: {wrong}"))?;
    }
    Ok(())
}

#[test]
fn no_change_is_missed_when_power_fails_between_backups() {
    for_each_seed("no_change_is_missed", 6, |seed| {
        if let Err(wrong) = sweep(seed, false) {
            panic!("{wrong}");
        }
    });
}

/// The canary: without barriers changes are missed.
#[test]
fn a_disk_that_ignores_flushes_makes_backups_miss_changes() {
    let noticed = (1..=3).filter(|seed| sweep(*seed, true).is_err());
    assert_eq!(noticed.count(), 3);
}

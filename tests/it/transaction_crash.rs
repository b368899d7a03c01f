//! Transactions over two images, with bitmaps and internal snapshots of both: after a crash anywhere neither image
//! misses what was answered, and no change is lost between bitmaps, also of different images.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk::block::{Action, Child, Graph};
use liveblk::blockdev::{BitmapChange, BitmapName, Blockdev, NewBitmap};
use liveblk::error::Result as BlockResult;
use liveblk::format::qcow2::Qcow2;
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, SimulatedDisk, VolatileStore,
    Workload, WorkloadOptions, attach, for_each_seed, full_access, simulate,
};
use nix::errno::Errno;

use super::bitmap_rotation::bits_of;
use super::bitmaps::{content, first_unmarked, image_for_bitmaps};
use super::chain::{Geometry, check_disk, create_on, open_image};
use super::crashes;

const NAMES: [&str; 2] = ["left", "right"];

/// What must be known after a crash.
#[derive(Clone, Default)]
struct Told {
    /// The disks when recording began.
    first: Vec<Vec<u8>>,
    /// The disks at each transaction; the last may be one that was not answered.
    moments: Vec<Vec<Vec<u8>>>,
    /// Transactions that were answered.
    answered: usize,
}

/// Two images in one graph.
struct Pair {
    graph: Graph,
    blockdev: Blockdev,
    disks: Vec<SimulatedDisk>,
    guests: Vec<Rc<Child>>,
}

impl Pair {
    async fn create(handle: &Handle, power: &Power, options: DiskOptions, seed: u64) -> Pair {
        let (geometry, size) = geometry(seed);
        let mut stores = Vec::new();
        for _ in NAMES {
            let disk = SimulatedDisk::empty(handle, seed);
            let created = create_on(&disk, &geometry.create_options(size)).await;
            created.expect("valid options");
            stores.push(disk.store());
        }
        let opened = Pair::open(handle, power, options, stores, seed).await;
        opened.expect("new images can be opened")
    }

    async fn open(
        handle: &Handle,
        power: &Power,
        options: DiskOptions,
        stores: Vec<VolatileStore>,
        seed: u64,
    ) -> BlockResult<Pair> {
        let graph = Graph::new();
        let (mut disks, mut guests) = (Vec::new(), Vec::new());
        for (store, name) in stores.into_iter().zip(NAMES) {
            let disk = SimulatedDisk::new(handle, power, options, store, seed);
            let node = open_image(&graph, name, &disk, &geometry(seed).0, None, false).await?;
            guests.push(attach(&graph, &node, full_access()));
            disks.push(disk);
        }
        Ok(Pair {
            blockdev: Blockdev::new(handle, &graph),
            graph,
            disks,
            guests,
        })
    }

    async fn contents(&self) -> Vec<Vec<u8>> {
        let mut contents = Vec::new();
        for guest in &self.guests {
            contents.push(content(&guest.node()).await);
        }
        contents
    }

    fn crash(&self, random: &mut Random) -> Vec<VolatileStore> {
        self.disks.iter().map(|disk| disk.crash(random)).collect()
    }

    async fn close(&self) -> BlockResult<()> {
        for guest in &self.guests {
            self.graph.detach(guest).await?;
        }
        Ok(())
    }
}

/// Refcounts that can count snapshots.
fn geometry(seed: u64) -> (Geometry, u64) {
    let (mut geometry, size) = image_for_bitmaps(seed);
    geometry.refcount_bits = geometry.refcount_bits.max(16);
    (geometry, size)
}

fn named(node: &str, name: &str) -> BitmapName {
    BitmapName {
        node: node.to_owned(),
        name: name.to_owned(),
    }
}

fn added(node: &str, name: &str, disabled: bool) -> BitmapChange {
    BitmapChange::Add(NewBitmap {
        node: node.to_owned(),
        name: name.to_owned(),
        granularity: Some(512),
        persistent: true,
        disabled,
    })
}

/// What guests and a backup program do to the pair.
#[derive(Clone)]
struct Life {
    pair: Rc<Pair>,
    workloads: Vec<Workload>,
    told: Rc<RefCell<Told>>,
    random: Rc<RefCell<Random>>,
}

impl Life {
    fn new(handle: &Handle, pair: Rc<Pair>, seed: u64) -> Life {
        let workload = |guest: &Rc<Child>| {
            let model = Model::zeroed(guest.node().size());
            Workload::new(
                handle,
                guest.clone(),
                model,
                WorkloadOptions::default(),
                seed,
            )
        };
        Life {
            workloads: pair.guests.iter().map(workload).collect(),
            pair,
            told: Rc::default(),
            random: Rc::new(RefCell::new(Random::new(seed ^ 0x7a))),
        }
    }

    async fn write(&self, requests: u64) {
        for workload in &self.workloads {
            workload.run(requests).await;
        }
    }

    async fn begin(&self) {
        self.write(10).await;
        self.told.borrow_mut().first = self.pair.contents().await;
        for node in NAMES {
            for (name, disabled) in [("archive", true), ("foreign", true), ("current", false)] {
                let added = self
                    .pair
                    .blockdev
                    .change_bitmap(added(node, name, disabled));
                added.await.expect("no fault");
            }
        }
    }

    /// On both images, in any order: a snapshot, and a rotation in which each also gets what the other has recorded.
    async fn transact(&self) -> BlockResult<()> {
        let now = self.pair.contents().await;
        let number = {
            let mut told = self.told.borrow_mut();
            let number = told.answered;
            told.moments.truncate(number);
            told.moments.push(now);
            number
        };
        let mut actions: Vec<Box<dyn Action>> = Vec::new();
        let blockdev = &self.pair.blockdev;
        let mut nodes = NAMES;
        if self.random.borrow_mut().percent(50) {
            nodes.reverse();
        }
        for node in nodes {
            let snapshot =
                blockdev.prepare_internal_snapshot(node, &format!("s{number}"), (0, 0))?;
            actions.push(Box::new(snapshot));
        }
        for (node, other) in [(nodes[0], nodes[1]), (nodes[1], nodes[0])] {
            for (target, source) in [("archive", node), ("foreign", other)] {
                actions.push(Box::new(blockdev.prepare_bitmap(BitmapChange::Merge {
                    target: named(node, target),
                    sources: vec![named(source, "current")],
                })));
            }
        }
        for node in nodes {
            let clear = BitmapChange::Clear(named(node, "current"));
            actions.push(Box::new(blockdev.prepare_bitmap(clear)));
        }
        self.pair.graph.transact(&actions).await?;
        self.told.borrow_mut().answered = number + 1;
        Ok(())
    }

    async fn live(&self) {
        for _ in 0..3 {
            self.write(8).await;
            self.transact().await.expect("no fault");
        }
        self.write(5).await;
    }
}

impl Told {
    /// Bitmaps cover what has changed; answers how many bytes they leave out.
    fn check_bitmaps(&self, pair: &Pair, now: &[Vec<u8>]) -> Result<u64, String> {
        let mut clean = 0;
        for side in 0..2 {
            let node = pair.guests[side].node();
            let mut own = bits_of(&node, "archive")?;
            own.merge(&bits_of(&node, "current")?);
            if let Some(offset) = first_unmarked(&own, &self.first[side], &now[side]) {
                return Err(format!("{}: {offset:#x} is not marked", NAMES[side]));
            }
            clean += own.size() - own.dirty_bytes().min(own.size());
            let Some(answered) = self.answered.checked_sub(1) else {
                continue;
            };
            let foreign = bits_of(&node, "foreign")?;
            let (first, then) = (&self.first[1 - side], &self.moments[answered][1 - side]);
            if let Some(offset) = first_unmarked(&foreign, first, then) {
                return Err(format!(
                    "{} has not got {offset:#x} of the other",
                    NAMES[side]
                ));
            }
        }
        Ok(clean)
    }

    /// Snapshots of answered transactions are there, of one that was not perhaps; each holds its moment.
    async fn check_snapshots(&self, pair: &Pair) -> Result<(), String> {
        for (side, guest) in pair.guests.iter().enumerate() {
            let node = guest.node();
            for name in ["archive", "foreign", "current"] {
                let remove = BitmapChange::Remove(named(NAMES[side], name));
                let removed = pair.blockdev.change_bitmap(remove).await;
                removed.map_err(|error| error.to_string())?;
            }
            let image = node.driver_as::<Qcow2>().expect("a qcow2 image");
            let found = image.snapshots();
            if found.len() < self.answered || found.len() > self.moments.len() {
                return Err(format!(
                    "{} snapshots after {} answers",
                    found.len(),
                    self.answered
                ));
            }
            for (number, moment) in self.moments.iter().enumerate().take(found.len()) {
                image
                    .apply_snapshot(number)
                    .await
                    .map_err(|error| error.to_string())?;
                if content(&node).await != moment[side] {
                    return Err(format!(
                        "snapshot {number} of {} is another moment",
                        NAMES[side]
                    ));
                }
            }
        }
        Ok(())
    }

    /// All of it, on what a crash left.
    async fn check(
        &self,
        handle: &Handle,
        left: Vec<VolatileStore>,
        options: DiskOptions,
        seed: u64,
    ) -> Result<u64, String> {
        let pair = Pair::open(handle, &Power::new(), options, left, seed).await;
        let pair = pair.map_err(|error| error.to_string())?;
        let clean = self.check_bitmaps(&pair, &pair.contents().await)?;
        self.check_snapshots(&pair).await?;
        pair.close().await.map_err(|error| error.to_string())?;
        for disk in &pair.disks {
            assert_harmless(disk).await?;
        }
        Ok(clean)
    }
}

/// Leaks, and COPIED flags that are missing, cost space and time and nothing else.
async fn assert_harmless(disk: &SimulatedDisk) -> Result<(), String> {
    let result = check_disk(disk).await.map_err(|error| error.to_string())?;
    match result.is_harmless() {
        true => Ok(()),
        false => Err(format!("{result:?}")),
    }
}

/// Answers how many operations there were, and how many bytes bitmaps left out.
fn crash_at(seed: u64, operation: Option<u64>, options: DiskOptions) -> Result<(u64, u64), String> {
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let life = runtime.block_on(async {
        let pair = Pair::create(&handle, &power, options, seed).await;
        let life = Life::new(&handle, Rc::new(pair), seed);
        life.begin().await;
        life
    });
    let begun = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    runtime.block_on(power.run(life.live()));
    let operations = power.operations() - begun;
    let left = life
        .pair
        .crash(&mut Random::new(seed ^ operation.unwrap_or(0) << 20));
    let told = life.told.borrow().clone();
    let sound = DiskOptions {
        ignores_flush: false,
        ..options
    };
    simulate(seed, async |handle| {
        let clean = told.check(&handle, left, sound, seed).await?;
        Ok((operations, clean))
    })
}

fn sweep(seed: u64, crashes: u64, options: DiskOptions) -> Result<u64, String> {
    crashes::sweep(seed, crashes, |operation| {
        crash_at(seed, operation, options)
    })
}

/// Power fails anywhere in a life with three transactions.
#[test]
fn a_transaction_over_two_images_loses_nothing_in_a_crash_anywhere() {
    for_each_seed("a_transaction_over_two_images", 6, |seed| {
        match sweep(seed, 60, DiskOptions::default()) {
            Ok(clean) => assert!(clean > 0, "all is dirty always"),
            Err(wrong) => panic!("{wrong}"),
        }
    });
}

/// The canary: without barriers something is lost.
#[test]
fn disks_that_ignore_flushes_make_transactions_lose_something() {
    let options = DiskOptions {
        ignores_flush: true,
        ..DiskOptions::default()
    };
    let noticed = (1..=6).filter(|seed| sweep(*seed, 30, options).is_err());
    assert!(noticed.count() >= 4);
}

/// A request of one of the disks fails in a transaction: no snapshot is left on either, and a crash after
/// that loses nothing.
#[test]
fn a_transaction_over_two_images_that_fails_has_changed_nothing() {
    for_each_seed("a_transaction_over_two_images_that_fails", 6, |seed| {
        let failed = (0..40).filter(|nth| fault_at(seed, *nth)).count();
        assert!(failed > 5, "{failed} transactions have failed");
    });
}

/// Answers whether the transaction has failed.
fn fault_at(seed: u64, nth: u64) -> bool {
    simulate(seed, async |handle| {
        let options = DiskOptions::default();
        let pair = Rc::new(Pair::create(&handle, &Power::new(), options, seed).await);
        let life = Life::new(&handle, pair.clone(), seed);
        life.begin().await;
        life.write(8).await;
        let kinds = [DiskOperation::Write, DiskOperation::Flush];
        let disk = &pair.disks[(nth % 2) as usize];
        disk.fail(Fault::once(&kinds, nth / 2, Errno::EIO));
        let made = life.transact().await;
        disk.heal();
        for guest in &pair.guests {
            let node = guest.node();
            let image = node.driver_as::<Qcow2>().expect("a qcow2 image");
            let count = image.snapshots().len();
            assert_eq!(count, usize::from(made.is_ok()), "fault {nth}");
        }
        if made.is_err() {
            life.told.borrow_mut().moments.clear();
        }
        life.write(5).await;
        let left = pair.crash(&mut Random::new(seed ^ nth));
        let told = life.told.borrow().clone();
        let checked = told.check(&handle, left, options, seed).await;
        assert!(checked.is_ok(), "fault {nth}: {checked:?}");
        made.is_err()
    })
}

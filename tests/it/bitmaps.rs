//! Dirty bitmaps over chains on simulated disks: what was changed is marked.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk::block::{Bitmap, BitmapFlags, Child, DirtyBitmap, Node, Permissions, Role};
use liveblk::buffer::MemorySlice;
use liveblk::format::raw::{Raw, RawOptions};
use liveblk::runtime::Runtime;
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, Workload, WorkloadOptions,
    for_each_seed, insert_with, simulate, writable,
};
use nix::errno::Errno;

use super::chain::{Chain, Geometry};
use super::crashes;

/// A bitmap of the node, and the node's content when it was empty.
struct Watched {
    node: Rc<Node>,
    bitmap: Rc<Bitmap>,
    before: Vec<u8>,
}

impl Watched {
    async fn begin(chain: &Chain, name: &str, granularity: u64) -> Watched {
        let node = chain.graph.find(name).expect("a node of the chain");
        let bits = DirtyBitmap::new(node.size(), granularity);
        let name = format!("b{granularity}");
        let bitmap = Rc::new(Bitmap::new(name, BitmapFlags::ENABLED, bits));
        node.bitmaps().add(bitmap.clone());
        let before = content(&node).await;
        Watched {
            node,
            bitmap,
            before,
        }
    }

    /// Every sector that reads otherwise than before is marked; then begins again.
    async fn check(&mut self) {
        let now = content(&self.node).await;
        let dirty = self.bitmap.clear().expect("nobody uses it");
        assert_eq!(dirty.size(), now.len() as u64, "{:?}", self.bitmap);
        // A file that grows has zeroes behind its old end.
        self.before.resize(now.len().max(self.before.len()), 0);
        for (index, sector) in now.chunks(512).enumerate() {
            let start = index as u64 * 512;
            let same = self.before[index * 512..].starts_with(sector);
            assert!(
                same || dirty.next_dirty(start) == Some(start),
                "{:?} of {:?}: {start:#x} has changed unmarked",
                self.bitmap,
                self.node
            );
        }
        self.before = now;
    }
}

pub(crate) async fn content(node: &Rc<Node>) -> Vec<u8> {
    let buffer = MemorySlice::zeroed(node.size() as usize);
    let read = node.driver().read(0, buffer.clone().into());
    read.await.expect("no fault");
    buffer.to_vec()
}

/// Where nobody says it, a bit stands for a cluster of the image within bounds, also through a raw node, and for
/// 64 KiB of what has no clusters; so does QEMU.
#[test]
fn the_default_granularity_is_qemus() {
    simulate(1, async |handle| {
        for (bits, expected) in [(9, 4096), (13, 8192), (16, 65536), (19, 65536)] {
            let mut geometry = Geometry::draw(&mut Random::new(1));
            geometry.cluster_bits = bits;
            let (power, options) = (Power::new(), DiskOptions::default());
            let chain = Chain::create(&handle, &power, &geometry, options, 1 << 20, 1).await;
            let image = chain.guest.node();
            assert_eq!(image.default_granularity(), expected);
            let file = image.child(Role::File).expect("a file").node();
            assert_eq!(file.default_granularity(), 65536);
            let edge = chain
                .graph
                .attach_for("raw", Role::File, &image, Permissions::NONE);
            let edge = edge.expect("nobody is kept off");
            let raw = Raw::open(edge.clone(), RawOptions::default()).expect("a plain disk");
            let raw = insert_with(&chain.graph, "raw", Box::new(raw), vec![edge], writable());
            assert_eq!(raw.default_granularity(), expected);
        }
    });
}

/// Guest writes, zeroes, discards and resizes, through a chain of two layers; bitmaps at the active layer
/// and at both files. A transfer that goes on to the file by the short way is marked there, too.
#[test]
fn what_has_changed_is_marked() {
    for_each_seed("what_has_changed_is_marked", 30, |seed| {
        simulate(seed, async |handle| {
            let mut random = Random::new(seed);
            let geometry = Geometry::draw(&mut random);
            let size = 512 * (300 + random.below(1000));
            let power = Power::new();
            let disk = DiskOptions::default();
            let mut chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
            let model = Model::zeroed(size);
            let options = WorkloadOptions::default();
            let workload = Workload::new(&handle, chain.guest.clone(), model, options, seed);
            workload.run(40).await;
            chain.snapshot().await.expect("no fault");
            let mut watched = Vec::new();
            for name in ["layer1", "layer1-file", "layer0", "layer0-file"] {
                for granularity in [512, 4096, 65536] {
                    watched.push(Watched::begin(&chain, name, granularity).await);
                }
            }
            for round in 0..4 {
                workload.run(30).await;
                if round % 2 == 1 {
                    workload.resize(512 * (300 + random.below(1000))).await;
                }
                for one in &mut watched {
                    one.check().await;
                }
            }
            workload.verify().await;
            chain.close().await.expect("no fault");
        });
    });
}

/// A persistent bitmap, and what the disk held when it was empty.
#[derive(Clone)]
pub(crate) struct Baseline {
    pub(crate) name: &'static str,
    pub(crate) content: Vec<u8>,
}

/// Granularities of the persistent bitmaps of a sweep.
const PERSISTENT: [(&str, u64); 3] = [("fine", 512), ("middle", 4096), ("coarse", 65536)];

/// Persistent bitmaps on the guest's node; they are in the image when this returns.
pub(crate) async fn add_persistent(guest: &Child, baselines: &RefCell<Vec<Baseline>>) {
    let node = guest.node();
    let store = node.driver().bitmap_store().expect("it stores bitmaps");
    for (name, granularity) in PERSISTENT {
        let bits = DirtyBitmap::new(node.size(), granularity);
        let flags = BitmapFlags::ENABLED | BitmapFlags::PERSISTENT;
        let content = content(&node).await;
        node.bitmaps().add(Rc::new(Bitmap::new(name, flags, bits)));
        store.update().await.expect("no fault");
        baselines.borrow_mut().push(Baseline { name, content });
    }
}

/// What a guest and a backup program do to a disk with persistent bitmaps.
pub(crate) async fn doings(
    guest: Rc<Child>,
    workload: Workload,
    baselines: Rc<RefCell<Vec<Baseline>>>,
    seed: u64,
) {
    let mut random = Random::new(seed ^ 0xb17);
    let node = guest.node();
    let store = node.driver().bitmap_store().expect("it stores bitmaps");
    workload.run(10).await;
    add_persistent(&guest, &baselines).await;
    for _ in 0..5 {
        workload.run(5 + random.below(20)).await;
        let (name, _) = random.choose(&PERSISTENT);
        let bitmap = node.bitmaps().find(name).expect("it was added");
        match random.below(6) {
            0 | 1 => {
                let content = content(&node).await;
                bitmap.clear().expect("nobody uses it");
                let mut baselines = baselines.borrow_mut();
                let one = baselines.iter_mut().find(|one| one.name == name);
                one.expect("it was added").content = content;
            }
            2 => store.update().await.expect("no fault"),
            3 => {
                let size = 512 * (100 + random.below(1000));
                for one in &mut *baselines.borrow_mut() {
                    one.content.truncate(size as usize);
                }
                workload.resize(size).await;
            }
            4 => {
                // All that was dirty is so again.
                let frozen = bitmap.freeze().expect("nobody uses it");
                workload.run(5).await;
                frozen.reclaim();
            }
            _ => drop(workload.flush().await),
        }
    }
}

/// An image that can store bitmaps, and the size of its disk.
pub(crate) fn image_for_bitmaps(seed: u64) -> (Geometry, u64) {
    let mut random = Random::new(seed);
    let mut geometry = Geometry::draw(&mut random);
    geometry.version = 3;
    (geometry, 512 * (300 + random.below(1000)))
}

/// After a crash at an operation, or none, every bitmap that was there has all that differs from when it
/// was empty. Answers how many operations there were, and how many parts of a bitmap were not dirty.
fn crash_at(seed: u64, operation: Option<u64>, disk: DiskOptions) -> Result<(u64, u64), String> {
    let (geometry, size) = image_for_bitmaps(seed);
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let baselines: Rc<RefCell<Vec<Baseline>>> = Rc::default();
    let (chain, workload) = runtime.block_on(async {
        let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
        let options = WorkloadOptions::default();
        let guest = chain.guest.clone();
        let model = Model::zeroed(size);
        let workload = Workload::new(&handle, guest, model, options, seed);
        (Rc::new(chain), workload)
    });
    let before = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    let run = doings(
        chain.guest.clone(),
        workload.clone(),
        baselines.clone(),
        seed,
    );
    runtime.block_on(power.run(run));
    let operations = power.operations() - before;
    let left = chain.crash(&mut Random::new(seed ^ operation.unwrap_or(0) << 20));
    let baselines = baselines.borrow().clone();
    let sound = DiskOptions {
        ignores_flush: false,
        ..disk
    };
    simulate(seed, async |handle| {
        let power = Power::new();
        let chain = Chain::open(&handle, &power, &geometry, sound, left, seed);
        let chain = chain.await.map_err(|error| error.to_string())?;
        let node = chain.guest.node();
        let mut clean = 0;
        let now = content(&node).await;
        for Baseline { name, content } in &baselines {
            let bitmap = node.bitmaps().find(name).ok_or(format!("{name} is lost"))?;
            if bitmap.is(BitmapFlags::INCONSISTENT) {
                return Err(format!("{name} is inconsistent"));
            }
            clean += bitmap.size() - bitmap.dirty_bytes().min(bitmap.size());
            let unmarked = bitmap.with_bits(|bits| first_unmarked(bits, content, &now));
            if let Some(offset) = unmarked {
                return Err(format!("{name} does not know of {offset:#x}"));
            }
        }
        let guest = chain.guest.clone();
        let mut model = workload.model().clone();
        drop(model.check_after_crash(&now));
        let after = Workload::new(&handle, guest, model, WorkloadOptions::default(), seed);
        after.run(20).await;
        chain.close().await.map_err(|error| error.to_string())?;
        chain.assert_sound(true, "after the restart").await;
        Ok((operations, clean))
    })
}

/// The first sector that is not what it was, and not marked.
pub(crate) fn first_unmarked(bits: &DirtyBitmap, before: &[u8], now: &[u8]) -> Option<u64> {
    let sectors = before.chunks(512).zip(now.chunks(512)).enumerate();
    let starts = sectors.filter(|(_, (before, now))| before != now);
    starts
        .map(|(index, _)| index as u64 * 512)
        .find(|start| bits.next_dirty(*start) != Some(*start))
}

/// So many crashes spread over the operations of a run.
fn sweep(seed: u64, crashes: u64, disk: DiskOptions) -> Result<u64, String> {
    crashes::sweep(seed, crashes, |operation| crash_at(seed, operation, disk))
}

/// Power fails anywhere: persistent bitmaps are there again, valid, and have every change since they were
/// empty; also one that a crash undid. And they are not simply all dirty.
#[test]
fn a_persistent_bitmap_is_valid_after_a_crash_anywhere() {
    for_each_seed("a_persistent_bitmap_is_valid", 8, valid_after_crashes);
}

#[test]
#[ignore = "a thousand crashes, and ten times that in the long run"]
fn a_persistent_bitmap_is_valid_after_thousands_of_crashes() {
    for_each_seed("a_persistent_bitmap_is_valid", 25, valid_after_crashes);
}

fn valid_after_crashes(seed: u64) {
    match sweep(seed, 40, DiskOptions::default()) {
        Ok(clean) => assert!(clean > 0, "all is dirty always"),
        Err(wrong) => panic!("{wrong}"),
    }
}

/// The canary: without barriers changes are missed.
#[test]
fn a_disk_that_ignores_flushes_makes_bitmaps_miss_changes() {
    let disk = DiskOptions {
        ignores_flush: true,
        ..DiskOptions::default()
    };
    let noticed = (1..=6).filter(|seed| sweep(*seed, 40, disk).is_err());
    assert!(noticed.count() >= 5);
}

/// Closed and opened again, bitmaps say just what they said, and the image has no leaks.
#[test]
fn a_clean_close_keeps_bitmaps_as_they_are() {
    for_each_seed("a_clean_close_keeps_bitmaps", 20, |seed| {
        simulate(seed, async |handle| {
            let (geometry, size) = image_for_bitmaps(seed);
            let (power, disk) = (Power::new(), DiskOptions::default());
            let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
            let guest = chain.guest.clone();
            let options = WorkloadOptions::default();
            let model = Model::zeroed(size);
            let workload = Workload::new(&handle, guest, model, options, seed);
            let baselines = Rc::default();
            let chain = Rc::new(chain);
            doings(chain.guest.clone(), workload, baselines, seed).await;
            let node = chain.guest.node();
            let bits = |node: &Node| {
                let mut all = node.bitmaps().all();
                all.sort_by_key(|bitmap| bitmap.name().to_owned());
                let copy = |bitmap: &Rc<Bitmap>| bitmap.with_bits(DirtyBitmap::clone);
                all.iter().map(copy).collect::<Vec<_>>()
            };
            let before = bits(&node);
            chain.close().await.expect("no fault");
            chain.assert_sound(false, "after a clean close").await;
            let left = vec![chain.disks[0].store()];
            let again = Chain::open(&handle, &power, &geometry, disk, left, seed).await;
            let again = again.expect("it can be opened again");
            assert_eq!(bits(&again.guest.node()), before);
            again.close().await.expect("no fault");
        });
    });
}

/// One request of the disk fails, anywhere: what the guest was told and what bitmaps say stays true.
#[test]
fn bitmaps_miss_nothing_when_the_disk_fails() {
    for_each_seed("bitmaps_miss_nothing", 6, |seed| {
        for nth in 0..30 {
            fault_at(seed, nth);
        }
    });
}

fn fault_at(seed: u64, nth: u64) {
    simulate(seed, async |handle| {
        let (geometry, size) = image_for_bitmaps(seed);
        let (power, disk) = (Power::new(), DiskOptions::default());
        let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
        let options = WorkloadOptions {
            tolerated: vec![Errno::EIO],
            ..WorkloadOptions::default()
        };
        let guest = chain.guest.clone();
        let model = Model::zeroed(size);
        let workload = Workload::new(&handle, guest, model, options, seed);
        workload.run(10).await;
        let baselines = RefCell::default();
        add_persistent(&chain.guest, &baselines).await;
        let kinds = [DiskOperation::Write, DiskOperation::Read];
        chain.disks[0].fail(Fault::once(&kinds, nth * 5, Errno::EIO));
        workload.run(60).await;
        chain.disks[0].heal();
        workload.verify().await;
        assert!(workload.flush().await || workload.flush().await);
        let left = chain.crash(&mut Random::new(seed ^ nth));
        let opened = Chain::open(&handle, &Power::new(), &geometry, disk, left, seed).await;
        let opened = opened.expect("it can be opened");
        let node = opened.guest.node();
        let now = content(&node).await;
        for Baseline { name, content } in &*baselines.borrow() {
            let bitmap = node.bitmaps().find(name).expect("it was stored");
            let unmarked = bitmap.with_bits(|bits| first_unmarked(bits, content, &now));
            assert_eq!(unmarked, None, "{name} after fault {nth}");
        }
        opened.close().await.expect("no fault");
    });
}

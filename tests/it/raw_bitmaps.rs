//! Persistent bitmaps of raw images, kept beside them: after a crash, a fault, or somebody else's write.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk::block::{BitmapFlags, Child, DirtyBitmap, Graph, Node, Shelf};
use liveblk::error::{ErrorKind, Result};
use liveblk::format::qcow2::BitmapKeeping;
use liveblk::format::raw::{BesideOptions, Raw, RawOptions};
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOptions, Model, Power, Random, ShelfContent, SimulatedDisk, SimulatedShelf, VolatileStore,
    Workload, WorkloadOptions, attach, for_each_seed, full_access, insert_with, simulate, writable,
};
use nix::errno::Errno;

use crate::bitmap_rotation::Rotation;
use crate::bitmaps::{Baseline, add_persistent, content, doings, first_unmarked};
use crate::chain::file_edge;
use crate::crashes;

/// What is left of an image and of what is beside it.
#[derive(Clone, Default)]
struct Left {
    image: VolatileStore,
    beside: ShelfContent,
}

impl Left {
    fn of_size(size: u64) -> Left {
        Left {
            image: VolatileStore::from_bytes(&vec![0; size as usize]),
            beside: ShelfContent::default(),
        }
    }
}

/// Marks of small regions, few of them.
const KEEPING: BitmapKeeping = BitmapKeeping {
    region: Some(16 << 10),
    most_marked: 4,
};

/// How a stage is made.
#[derive(Clone, Copy, Default)]
struct Making {
    read_only: bool,
    ignores_sync: bool,
}

/// An open raw image with a guest.
struct Stage {
    graph: Graph,
    disk: SimulatedDisk,
    shelf: SimulatedShelf,
    guest: Rc<Child>,
}

impl Stage {
    async fn open(handle: &Handle, power: &Power, left: Left, making: Making) -> Result<Stage> {
        Stage::open_as(handle, power, left, making, "an image").await
    }

    async fn open_as(
        handle: &Handle,
        power: &Power,
        left: Left,
        making: Making,
        identity: &str,
    ) -> Result<Stage> {
        let graph = Graph::new();
        let options = DiskOptions {
            garbles_discards: false,
            ..DiskOptions::default()
        };
        let disk = SimulatedDisk::new(handle, power, options, left.image, 7);
        let image = disk.clone();
        let stamp = move || image.store().sequence().to_string();
        let shelf = SimulatedShelf::new(handle, power, left.beside, stamp, making.ignores_sync);
        shelf.set_identity(identity);
        let file = file_edge(&graph, "raw", &disk);
        let raw = Raw::open(file.clone(), RawOptions::default())?;
        let options = BesideOptions {
            node_name: "raw".to_owned(),
            shelf: Rc::new(shelf.clone()),
            keeping: KEEPING,
            read_only: making.read_only,
        };
        let driver = Box::new(raw.with_bitmaps(options).await?);
        let mut options = writable();
        options.read_only = making.read_only;
        let node = insert_with(&graph, "raw", driver, vec![file], options);
        let wanted = match making.read_only {
            true => liveblk::block::Permissions::NONE,
            false => full_access(),
        };
        let guest = attach(&graph, &node, wanted);
        Ok(Stage {
            graph,
            disk,
            shelf,
            guest,
        })
    }

    fn node(&self) -> Rc<Node> {
        self.guest.node()
    }

    fn workload(&self, handle: &Handle, seed: u64) -> Workload {
        let model = Model::from_bytes(&self.disk.to_bytes());
        let options = WorkloadOptions {
            tolerated: vec![Errno::EIO],
            ..WorkloadOptions::default()
        };
        Workload::new(handle, self.guest.clone(), model, options, seed)
    }

    fn crash(&self, random: &mut Random) -> Left {
        Left {
            image: self.disk.crash(random),
            beside: self.shelf.crash(random),
        }
    }

    async fn close(self) -> Result<Left> {
        self.graph.detach(&self.guest).await?;
        Ok(Left {
            image: self.disk.store(),
            beside: self.shelf.content(),
        })
    }
}

fn size_of_disk(seed: u64) -> u64 {
    512 * (300 + Random::new(seed).below(1000))
}

/// Every bitmap that was there is valid, and has all that differs from when it was empty. Answers how many bytes
/// are clean.
async fn check(node: &Rc<Node>, baselines: &[Baseline]) -> Result<u64, String> {
    let now = content(node).await;
    let mut clean = 0;
    for Baseline { name, content } in baselines {
        let bitmap = node.bitmaps().find(name).ok_or(format!("{name} is lost"))?;
        if bitmap.is(BitmapFlags::INCONSISTENT) {
            return Err(format!("{name} is inconsistent"));
        }
        clean += bitmap.size() - bitmap.dirty_bytes().min(bitmap.size());
        if let Some(offset) = bitmap.with_bits(|bits| first_unmarked(bits, content, &now)) {
            return Err(format!("{name} does not know of {offset:#x}"));
        }
    }
    Ok(clean)
}

/// A crash at an operation of the disk or the shelf, or none. Answers how many there were, and how much of the
/// bitmaps was clean.
fn crash_at(seed: u64, operation: Option<u64>, ignores_sync: bool) -> Result<(u64, u64), String> {
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let baselines: Rc<RefCell<Vec<Baseline>>> = Rc::default();
    let making = Making {
        ignores_sync,
        ..Making::default()
    };
    let left = Left::of_size(size_of_disk(seed));
    let stage = runtime.block_on(Stage::open(&handle, &power, left, making));
    let stage = stage.map_err(|error| error.to_string())?;
    let workload = stage.workload(&handle, seed);
    let before = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    let run = doings(stage.guest.clone(), workload, baselines.clone(), seed);
    runtime.block_on(power.run(run));
    let operations = power.operations() - before;
    let left = stage.crash(&mut Random::new(seed ^ operation.unwrap_or(0) << 20));
    let baselines = baselines.borrow().clone();
    simulate(seed, async |handle| {
        let opened = Stage::open(&handle, &Power::new(), left, Making::default()).await;
        let opened = opened.map_err(|error| error.to_string())?;
        let clean = check(&opened.node(), &baselines).await?;
        opened.workload(&handle, seed).run(20).await;
        let left = opened.close().await.map_err(|error| error.to_string())?;
        let again = Stage::open(&handle, &Power::new(), left, Making::default()).await;
        let again = again.map_err(|error| error.to_string())?;
        check(&again.node(), &baselines).await?;
        Ok((operations, clean))
    })
}

/// So many crashes spread over the operations of a run.
fn sweep(seed: u64, crashes: u64, ignores_sync: bool) -> Result<u64, String> {
    crashes::sweep(seed, crashes, |operation| {
        crash_at(seed, operation, ignores_sync)
    })
}

/// Power fails between any two steps: bitmaps are there again, valid, and have every change since they were empty.
#[test]
fn raw_bitmaps_are_valid_after_a_crash_anywhere() {
    for_each_seed("raw_bitmaps_are_valid", 8, |seed| {
        match sweep(seed, 40, false) {
            Ok(clean) => assert!(clean > 0, "all is dirty always"),
            Err(wrong) => panic!("{wrong}"),
        }
    });
}

/// The canary: where nothing beside the image is durable, changes are missed or bitmaps lost.
#[test]
fn a_shelf_that_never_syncs_is_noticed() {
    let noticed = (1..=6).filter(|seed| sweep(*seed, 40, true).is_err());
    assert!(noticed.count() >= 5);
}

/// A crash in a life with three rotations, at an operation or at none. Answers how many there were.
fn rotated(seed: u64, operation: Option<u64>) -> Result<u64, String> {
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let left = Left::of_size(size_of_disk(seed));
    let (stage, rotation) = runtime.block_on(async {
        let stage = Stage::open(&handle, &power, left, Making::default()).await;
        let stage = stage.expect("it can be opened");
        let workload = stage.workload(&handle, seed);
        let rotation = Rotation::new(&handle, &stage.graph, &stage.guest, workload);
        rotation.begin().await;
        (stage, rotation)
    });
    let begun = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    runtime.block_on(power.run(rotation.live()));
    let operations = power.operations() - begun;
    let left = stage.crash(&mut Random::new(seed ^ operation.unwrap_or(0) << 20));
    let told = rotation.told.borrow().clone();
    simulate(seed, async |handle| {
        let opened = Stage::open(&handle, &Power::new(), left, Making::default()).await;
        let opened = opened.map_err(|error| error.to_string())?;
        told.check(&opened.node(), &content(&opened.node()).await)?;
        Ok(operations)
    })
}

/// What a transaction hands from one bitmap to another is in one of them; what it removes stays away.
#[test]
fn a_rotation_of_raw_bitmaps_loses_nothing_in_a_crash_anywhere() {
    for_each_seed("a_rotation_of_raw_bitmaps", 6, |seed| {
        let operations = rotated(seed, None).expect("no crash");
        for operation in crashes::points(seed, operations, 40) {
            if let Err(wrong) = rotated(seed, Some(operation)) {
                panic!("crash at {operation}: {wrong}");
            }
        }
    });
}

fn bits(node: &Node) -> Vec<(String, BitmapFlags, DirtyBitmap)> {
    let all = node.bitmaps().all().into_iter().map(|bitmap| {
        let bits = bitmap.with_bits(DirtyBitmap::clone);
        (bitmap.name().to_owned(), bitmap.flags(), bits)
    });
    let mut all: Vec<_> = all.collect();
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

/// An image with bitmaps that was closed, and what they said.
async fn closed(handle: &Handle, seed: u64) -> (Left, Vec<(String, BitmapFlags, DirtyBitmap)>) {
    let left = Left::of_size(size_of_disk(seed));
    let stage = Stage::open(handle, &Power::new(), left, Making::default()).await;
    let stage = stage.expect("nothing is stored");
    let workload = stage.workload(handle, seed);
    doings(stage.guest.clone(), workload, Rc::default(), seed).await;
    let before = bits(&stage.node());
    (stage.close().await.expect("no fault"), before)
}

async fn open(handle: &Handle, left: &Left) -> Stage {
    let stage = Stage::open(handle, &Power::new(), left.clone(), Making::default()).await;
    stage.expect("it can be opened")
}

fn are_inconsistent(node: &Node) -> bool {
    let all = node.bitmaps().all();
    assert_eq!(all.len(), 3);
    let bad = all.iter().filter(|one| one.is(BitmapFlags::INCONSISTENT));
    let count = bad.count();
    assert!(count == 0 || count == 3, "{all:?}");
    count > 0
}

#[test]
fn a_clean_close_keeps_raw_bitmaps_as_they_are() {
    for_each_seed("a_clean_close_keeps_raw_bitmaps", 20, |seed| {
        simulate(seed, async |handle| {
            let (mut left, before) = closed(&handle, seed).await;
            for _ in 0..2 {
                let again = open(&handle, &left).await;
                assert_eq!(bits(&again.node()), before);
                left = again.close().await.expect("no fault");
            }
            let making = Making {
                read_only: true,
                ..Making::default()
            };
            let power = Power::new();
            let again = Stage::open(&handle, &power, left, making).await;
            let again = again.expect("it is there");
            let all = again.node().bitmaps().all();
            assert!(all.iter().all(|one| one.is(BitmapFlags::READ_ONLY)));
            assert!(!are_inconsistent(&again.node()));
        });
    });
}

/// Who has written the image meanwhile is noticed, also where bits are not looked at before the next time.
#[test]
fn another_programs_write_makes_raw_bitmaps_inconsistent() {
    simulate(3, async |handle| {
        let (mut left, _) = closed(&handle, 3).await;
        left.image.write(0, &[1]);
        for _ in 0..2 {
            let again = open(&handle, &left).await;
            assert!(are_inconsistent(&again.node()));
            left = again.close().await.expect("no fault");
        }
    });
}

#[test]
fn another_image_of_the_same_name_has_no_true_bitmaps() {
    simulate(4, async |handle| {
        let (left, _) = closed(&handle, 4).await;
        let other = Stage::open_as(&handle, &Power::new(), left, Making::default(), "new").await;
        assert!(are_inconsistent(&other.expect("it can be opened").node()));
    });
}

/// After a crash what is longer is dirty there, and what is shorter is not the image that was left.
#[test]
fn a_size_that_is_not_the_stored_one_counts_after_a_crash() {
    simulate(5, async |handle| {
        let stage = open(&handle, &Left::of_size(1 << 20)).await;
        add_persistent(&stage.guest, &RefCell::default()).await;
        let mut left = stage.crash(&mut Random::new(5));
        left.image.truncate(2 << 20);
        let longer = open(&handle, &left).await;
        assert!(!are_inconsistent(&longer.node()));
        for (name, _, bits) in bits(&longer.node()) {
            assert_eq!(bits.next_dirty(0), Some(1 << 20), "{name}");
            assert_eq!(bits.dirty_bytes(), 1 << 20, "{name}");
        }
        left.image.truncate(1 << 19);
        let shorter = open(&handle, &left).await;
        assert!(are_inconsistent(&shorter.node()));
    });
}

#[test]
fn what_is_damaged_is_told() {
    simulate(6, async |handle| {
        let (mut left, _) = closed(&handle, 6).await;
        let mut bytes = left.beside.to_bytes().expect("it is there");
        bytes[100] ^= 1;
        left.beside = ShelfContent::from_bytes(&bytes);
        let refused = Stage::open(&handle, &Power::new(), left, Making::default()).await;
        let error = refused.err().expect("its digest is wrong");
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.to_string().contains("a shelf"), "{error}");
    });
}

/// Two do not keep bitmaps of one image, and who only reads does not trust what another may be writing.
#[test]
fn a_shelf_has_one_writer() {
    simulate(7, async |handle| {
        let (left, _) = closed(&handle, 7).await;
        let stage = open(&handle, &left).await;
        let error = stage.shelf.lock().await.err();
        assert!(error.is_some(), "it is open for writing");
        let shelf = stage.shelf.clone();
        stage.close().await.expect("no fault");
        shelf.lock().await.expect("it is closed");
    });
}

/// Steps fail anywhere, once or for some time: guests are told, and no change is missed, then or after a crash.
#[test]
fn raw_bitmaps_miss_nothing_when_the_shelf_fails() {
    let mut struck = 0;
    for_each_seed("raw_bitmaps_miss_nothing", 4, |seed| {
        for well in (0..25).step_by(2) {
            for failing in [1, 3, 40] {
                struck += fault_at(seed, well, failing);
            }
        }
    });
    assert!(struck > 0, "no guest ever met a fault");
}

fn fault_at(seed: u64, well: u64, failing: u64) -> u64 {
    simulate(seed, async |handle| {
        let stage = open(&handle, &Left::of_size(size_of_disk(seed))).await;
        let workload = stage.workload(&handle, seed);
        workload.run(10).await;
        let baselines = RefCell::default();
        add_persistent(&stage.guest, &baselines).await;
        stage.shelf.fail_after(well, failing);
        workload.run(60).await;
        let baselines = baselines.borrow().clone();
        let left = stage.crash(&mut Random::new(seed ^ well << 8 ^ failing));
        let crashed = open(&handle, &left).await;
        let told = check(&crashed.node(), &baselines).await;
        told.expect("after a crash among faults");
        stage.shelf.fail_after(0, 0);
        workload.run(20).await;
        workload.verify().await;
        let failures = workload.failures();
        let left = stage.close().await.expect("it works again");
        let closed = open(&handle, &left).await;
        let told = check(&closed.node(), &baselines).await;
        told.expect("after a clean end");
        failures
    })
}

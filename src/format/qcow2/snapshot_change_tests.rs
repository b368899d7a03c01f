//! Making internal snapshots, deleting them and going back: against a model, under crashes and faults.

use std::cell::Cell;

use nix::errno::Errno;

use super::create::CreateOptions;
use super::tests::{Image, change, geometry};
use super::{CacheSizes, Qcow2, check};
use crate::block::{Graph, Node, Role, WriteFlags};
use crate::buffer::MemorySlice;
use crate::error::{ErrorKind, Result};
use crate::runtime::Handle;
use crate::testing::{
    DiskOperation, DiskOptions, Fault, Power, Random, SimulatedDisk, VolatileStore, disk_of,
    for_each_seed, simulate,
};

/// What an image should hold: the disk, and what it was at each snapshot.
#[derive(Clone, PartialEq, Eq)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Create,
    Delete,
    Apply,
}

impl Change {
    async fn make(self, image: &Image) -> Result<()> {
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        match self {
            Change::Create => qcow2.create_snapshot("new", (1, 2)).await,
            // The newest: what it alone shares with the disk is the disk's own again.
            Change::Delete => qcow2.delete_snapshot(1).await,
            Change::Apply => qcow2.apply_snapshot(0).await,
        }
    }

    fn in_model(self, model: &mut Model) {
        match self {
            Change::Create => model.snapshots.push(("new".to_owned(), model.disk.clone())),
            Change::Delete => drop(model.snapshots.remove(1)),
            Change::Apply => model.disk = model.snapshots[0].1.clone(),
        }
    }
}

fn qcow2_of(node: &Node) -> &Qcow2 {
    node.driver_as().expect("a qcow2 image")
}

async fn open(disk: &SimulatedDisk) -> Image {
    let caches = CacheSizes::default();
    let image = Image::open(&Graph::new(), "i", disk, None, caches).await;
    image.expect("a valid image")
}

fn names(image: &Image) -> Vec<String> {
    let node = image.guest.node();
    let qcow2 = qcow2_of(&node);
    qcow2
        .snapshots()
        .into_iter()
        .map(|snapshot| snapshot.name)
        .collect()
}

/// Random changes, now and then of compressed clusters.
async fn write_about(image: &Image, disk: &mut [u8], random: &mut Random, count: u64) {
    for _ in 0..count {
        change(image, disk, random).await;
        if random.percent(10) {
            let limits = image.guest.node().driver().limits();
            let cluster = (limits.optimal_transfer as usize).min(disk.len());
            let start = random.below((disk.len() / cluster) as u64) as usize * cluster;
            disk[start..start + cluster].fill(random.next_u64() as u8);
            let payload = MemorySlice::from_bytes(&disk[start..start + cluster]);
            let write = image
                .guest
                .write(start as u64, payload.into(), WriteFlags::COMPRESSED);
            write.await.expect("no fault");
        }
    }
}

/// An image with two snapshots, as bytes, and what it holds.
async fn with_snapshots(handle: &Handle, random: &mut Random) -> (Vec<u8>, Model) {
    let size = 512 * (100 + random.below(300));
    let mut options = geometry(random, size);
    options.cluster_size = 1 << random.choose(&[9, 10, 12]);
    options.refcount_bits = if options.version < 3 {
        16
    } else {
        random.choose(&[8, 16, 64])
    };
    let image = Image::new(handle, "i", options, None, CacheSizes::default()).await;
    let mut model = Model {
        disk: vec![0; size as usize],
        snapshots: Vec::new(),
    };
    for name in ["old", "newer"] {
        write_about(&image, &mut model.disk, random, 20).await;
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        qcow2.create_snapshot(name, (0, 0)).await.expect("room");
        model.snapshots.push((name.to_owned(), model.disk.clone()));
    }
    write_about(&image, &mut model.disk, random, 10).await;
    image.close().await;
    image.assert_clean().await;
    (image.disk.to_bytes(), model)
}

/// Nothing is wrong but leaks, and COPIED flags that are missing.
async fn assert_harmless(image: &Image) {
    let file = image.guest.node().child(Role::File).expect("a file");
    let result = check::check(&file).await.expect("a valid header");
    assert!(result.is_harmless(), "{result:?}");
}

/// The image is as one of these, or, where `disk_differs`, has at least the snapshots of one; and it stays so while
/// its disk is written all over.
async fn assert_one_of(
    handle: &Handle,
    bytes: &[u8],
    candidates: &[Model],
    disk_differs: bool,
    random: &mut Random,
) {
    let disk = disk_of(handle, bytes, random.next_u64());
    let image = open(&disk).await;
    assert_harmless(&image).await;
    let found = names(&image);
    let mut size = image.guest.node().size() as usize;
    let mut now = image.read(0, size).await;
    let names_of = |model: &Model| {
        model
            .snapshots
            .iter()
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    };
    let fitting = candidates
        .iter()
        .find(|model| names_of(model) == found && (disk_differs || model.disk == now));
    let fitting =
        fitting.unwrap_or_else(|| panic!("snapshots {found:?}, or the disk, fit nothing"));
    write_about(&image, &mut now, random, 40).await;
    image.guest.flush().await.expect("no fault");
    assert_harmless(&image).await;
    for (number, (name, content)) in fitting.snapshots.iter().enumerate() {
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        qcow2.apply_snapshot(number).await.expect("no fault");
        size = image.guest.node().size() as usize;
        assert!(
            image.read(0, size).await == *content,
            "snapshot {name} changed"
        );
    }
    image.close().await;
    assert_harmless(&image).await;
}

async fn run_against_model(handle: &Handle, random: &mut Random) {
    let (bytes, mut model) = with_snapshots(handle, random).await;
    let disk = disk_of(handle, &bytes, 1);
    let mut image = open(&disk).await;
    for round in 0..12 {
        write_about(&image, &mut model.disk, random, 8).await;
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        let count = model.snapshots.len() as u64;
        match random.below(3) {
            0 if count > 0 => {
                let number = random.below(count) as usize;
                qcow2.delete_snapshot(number).await.expect("no fault");
                model.snapshots.remove(number);
            }
            1 if count > 0 => {
                let number = random.below(count) as usize;
                qcow2.apply_snapshot(number).await.expect("no fault");
                model.disk = model.snapshots[number].1.clone();
            }
            _ => {
                let name = format!("s{round}");
                qcow2
                    .create_snapshot(&name, (0, 0))
                    .await
                    .expect("no fault");
                model.snapshots.push((name, model.disk.clone()));
            }
        }
        if random.percent(30) {
            image.close().await;
            image.assert_clean().await;
            image = open(&disk).await;
        }
    }
    image.close().await;
    image.assert_clean().await;
    assert_one_of(handle, &disk.to_bytes(), &[model], false, random).await;
}

#[test]
fn snapshots_made_deleted_and_gone_back_to_hold_what_the_disk_held() {
    for_each_seed("snapshots_made_deleted_and_gone_back_to", 40, |seed| {
        simulate(seed, async |handle| {
            run_against_model(&handle, &mut Random::new(seed)).await
        });
    });
}

/// Power fails after so many operations of the change and of writes after it; false where it did not.
async fn crash(
    handle: &Handle,
    start: &(Vec<u8>, Model),
    what: Change,
    after: u64,
    random: &mut Random,
) -> bool {
    let (bytes, before) = start;
    let power = Power::new();
    let store = VolatileStore::from_bytes(bytes);
    let disk = SimulatedDisk::new(handle, &power, DiskOptions::default(), store, after);
    let made = Cell::new(false);
    let image = open(&disk).await;
    power.fail_after(after);
    let mut written = before.disk.clone();
    let finished = power
        .run(async {
            what.make(&image).await.expect("no fault");
            made.set(true);
            written = image.read(0, image.guest.node().size() as usize).await;
            write_about(&image, &mut written, random, 5).await;
            image.guest.flush().await.expect("no fault");
        })
        .await;
    let mut after = before.clone();
    what.in_model(&mut after);
    let left = disk.crash(random).to_bytes();
    let candidates = [before.clone(), after];
    // What was answered is there for good; what is in the making may be.
    let possible = if made.get() {
        &candidates[1..]
    } else {
        &candidates[..]
    };
    assert_one_of(handle, &left, possible, made.get(), random).await;
    finished.is_none()
}

#[test]
fn a_crash_leaves_the_snapshots_before_or_after() {
    let mut crashes = 0;
    for what in [Change::Create, Change::Delete, Change::Apply] {
        for_each_seed("a_crash_leaves_the_snapshots", 5, |seed| {
            simulate(seed, async |handle| {
                let mut random = Random::new(seed);
                let start = with_snapshots(&handle, &mut random).await;
                let mut after = 1;
                while crash(&handle, &start, what, after, &mut random).await {
                    crashes += 1;
                    after += 1 + random.below(3);
                }
            });
        });
    }
    assert!(crashes > 150, "{crashes} crashes only");
}

/// The operation that fails, from 1; false where none did.
async fn fault(
    handle: &Handle,
    start: &(Vec<u8>, Model),
    what: Change,
    at: u64,
    random: &mut Random,
) -> bool {
    let (bytes, before) = start;
    let disk = disk_of(handle, bytes, at);
    let image = open(&disk).await;
    let kind = random.choose(&[
        DiskOperation::Read,
        DiskOperation::Write,
        DiskOperation::Flush,
    ]);
    disk.fail(Fault::once(&[kind], at, Errno::EIO));
    let made = what.make(&image).await;
    let struck = disk.faults_struck() > 0;
    disk.heal();
    let mut model = before.clone();
    if made.is_ok() {
        what.in_model(&mut model);
    } else {
        assert!(struck, "{made:?}");
    }
    assert_eq!(
        names(&image),
        model
            .snapshots
            .iter()
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    );
    write_about(&image, &mut model.disk, random, 10).await;
    image.close().await;
    assert_one_of(handle, &disk.to_bytes(), &[model], false, random).await;
    struck
}

#[test]
fn a_fault_leaves_the_snapshots_as_the_answer_says() {
    let mut faults = 0;
    for what in [Change::Create, Change::Delete, Change::Apply] {
        for_each_seed("a_fault_leaves_the_snapshots", 8, |seed| {
            simulate(seed, async |handle| {
                let mut random = Random::new(seed);
                let start = with_snapshots(&handle, &mut random).await;
                for at in 1..40 {
                    faults += u64::from(fault(&handle, &start, what, at, &mut random).await);
                }
            });
        });
    }
    assert!(faults > 120, "{faults} faults only");
}

/// Requests that may fail.
async fn write_in_vain(image: &Image, random: &mut Random) {
    let size = image.guest.node().size();
    for _ in 0..20 {
        let offset = random.below(size / 512) * 512;
        let payload = MemorySlice::from_bytes(&[random.next_u64() as u8; 512]);
        let _ = image
            .guest
            .write(offset, payload.into(), WriteFlags::empty())
            .await;
        if random.percent(20) {
            let _ = image.guest.flush().await;
        }
    }
}

/// The file cannot be flushed any more from some flush on: nobody knows which header it has. Then power fails.
async fn unsure(
    handle: &Handle,
    start: &(Vec<u8>, Model),
    what: Change,
    from: u64,
    random: &mut Random,
) -> bool {
    let (bytes, before) = start;
    let power = Power::new();
    let store = VolatileStore::from_bytes(bytes);
    let disk = SimulatedDisk::new(handle, &power, DiskOptions::default(), store, from);
    let image = open(&disk).await;
    disk.fail(Fault::from(&[DiskOperation::Flush], from, Errno::EIO));
    let made = what.make(&image).await;
    let failed = disk.faults_struck() > 0;
    write_in_vain(&image, random).await;
    let left = disk.crash(random).to_bytes();
    let mut after = before.clone();
    what.in_model(&mut after);
    let candidates = [before.clone(), after];
    let possible = if made.is_ok() {
        &candidates[1..]
    } else {
        &candidates[..]
    };
    assert_one_of(handle, &left, possible, true, random).await;
    failed
}

#[test]
fn nothing_is_given_back_while_nobody_knows_the_header() {
    let mut failures = 0;
    for what in [Change::Create, Change::Delete, Change::Apply] {
        for_each_seed("nothing_is_given_back_while_nobody_knows", 30, |seed| {
            simulate(seed, async |handle| {
                let mut random = Random::new(seed);
                let start = with_snapshots(&handle, &mut random).await;
                for from in 0..10 {
                    failures += u64::from(unsure(&handle, &start, what, from, &mut random).await);
                }
            });
        });
    }
    assert!(failures > 300, "{failures} failures only");
}

/// A snapshot that names one L2 table twice is refused before anything has changed.
#[test]
fn a_snapshot_that_no_disk_can_be_changes_nothing() {
    simulate(1, async |handle| {
        let options = CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(128 << 10)
        };
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        image.write(0, &[1; 128 << 10]).await;
        let node = image.guest.node();
        let made = qcow2_of(&node).create_snapshot("one", (0, 0)).await;
        made.expect("no fault");
        image.write(0, &[2; 128 << 10]).await;
        image.close().await;
        let l1 = qcow2_of(&node).snapshots()[0].l1_offset.0 as usize;
        let mut bytes = image.disk.to_bytes();
        bytes.copy_within(l1..l1 + 8, l1 + 8);
        let disk = disk_of(&handle, &bytes, 1);
        let image = open(&disk).await;
        let node = image.guest.node();
        let refused = qcow2_of(&node).apply_snapshot(0).await;
        let error = refused.expect_err("an L2 table is named twice");
        assert!(
            error.message().contains("overlaps other metadata"),
            "{error}"
        );
        assert_eq!(image.read(0, 128 << 10).await, [2; 128 << 10]);
        image.write(512, &[3; 512]).await;
        image.close().await;
        assert_eq!(open(&disk).await.read(511, 2).await, [2, 3]);
    });
}

/// Compressed clusters share host clusters, so that a refcount may rise by many at once.
#[test]
fn a_snapshot_that_refcounts_cannot_count_changes_nothing() {
    simulate(1, async |handle| {
        let options = CreateOptions {
            refcount_bits: 4,
            ..CreateOptions::new(1 << 20)
        };
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        for cluster in 0..5 {
            let payload = MemorySlice::from_bytes(&[cluster; 65536]);
            let write = image.guest.write(
                u64::from(cluster) << 16,
                payload.into(),
                WriteFlags::COMPRESSED,
            );
            write.await.expect("no fault");
        }
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        qcow2
            .create_snapshot("one", (0, 0))
            .await
            .expect("10 references");
        qcow2
            .create_snapshot("two", (0, 0))
            .await
            .expect("15 references");
        image.write(0, &[9; 512]).await;
        let error = qcow2
            .create_snapshot("three", (0, 0))
            .await
            .expect_err("19 references");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(qcow2.apply_snapshot(0).await.is_err());
        assert_eq!(names(&image), ["one", "two"]);
        assert_eq!(image.read(0, 513).await[511..], [9, 0]);
        image.close().await;
        image.assert_clean().await;
        qcow2.delete_snapshot(1).await.expect("no fault");
        qcow2.apply_snapshot(0).await.expect("room again");
        assert_eq!(image.read(65535, 2).await, [0, 1]);
        image.close().await;
        image.assert_clean().await;
    });
}

#[test]
fn snapshots_that_cannot_be_are_refused() {
    simulate(1, async |handle| {
        let options = CreateOptions {
            refcount_bits: 1,
            ..CreateOptions::new(1 << 20)
        };
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        image.write(0, &[1; 512]).await;
        let node = image.guest.node();
        let qcow2 = qcow2_of(&node);
        let error = qcow2
            .create_snapshot("s", (0, 0))
            .await
            .expect_err("1 bit counts one user");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(qcow2.create_snapshot("", (0, 0)).await.is_err());
        assert!(
            qcow2
                .create_snapshot(&"n".repeat(256), (0, 0))
                .await
                .is_err()
        );
        image.close().await;
        image.assert_clean().await;
    });
}

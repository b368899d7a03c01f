//! The copy-before-write filter over chains of images: what it keeps is what the disk held when it was put
//! in, however its guest goes on, and whatever fails.

use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use liveblk::block::{Child, Node, NodeSpec, Permission, Permissions, Role};
use liveblk::buffer::MemorySlice;
use liveblk::filter::{CbwOptions, CopyBeforeWrite, OnCbwError, Snapshot, SnapshotAccess};
use liveblk::format::raw::{Raw, RawOptions};
use liveblk::range::ByteRange;
use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, SimulatedDisk, Workload,
    WorkloadOptions, attach, disk_of, for_each_seed, insert_with, simulate, writable,
};

use super::chain::{Chain, Geometry, create_on, file_edge, open_image};

/// A chain with a guest, a filter above it, and what the filter keeps.
struct Kept {
    chain: Chain,
    workload: Workload,
    filter: Rc<Node>,
    target: SimulatedDisk,
    reader: Rc<Child>,
    /// What the disk held when the filter was put in.
    before: Vec<u8>,
    random: Random,
}

const SHARED: Permissions = Permissions {
    required: Permission::CONSISTENT_READ.union(Permission::WRITE),
    shared: Permission::all(),
};

impl Kept {
    async fn new(handle: &Handle, seed: u64, options: CbwOptions, errors: &[Errno]) -> Kept {
        let mut random = Random::new(seed);
        let geometry = Geometry::draw(&mut random);
        let size = (512 * (300 + random.below(2000))).max(5 << geometry.cluster_bits);
        let disk_options = DiskOptions {
            request_alignment: random.choose(&[1, 512]),
            ..DiskOptions::default()
        };
        let power = Power::new();
        let mut chain = Chain::create(handle, &power, &geometry, disk_options, size, seed).await;
        let workload_options = WorkloadOptions {
            depth: random.choose(&[2, 4, 8, 16]),
            longest: random.choose(&[4096, 32 << 10, 300 << 10]),
            tolerated: errors.to_vec(),
            ..WorkloadOptions::default()
        };
        let model = Model::zeroed(size);
        let workload = Workload::new(handle, chain.guest.clone(), model, workload_options, seed);
        workload.run(40 + random.below(40)).await;
        if random.percent(50) {
            chain.snapshot().await.expect("no fault");
            workload.run(random.below(30)).await;
        }
        let before = whole(&chain.guest).await;
        let (target, target_node) = open_target(&chain, &mut random, size).await;
        let top = chain.guest.node();
        let spec = NodeSpec {
            name: "filter".into(),
            options: writable(),
            file_name: String::new(),
            implicit: false,
        };
        // The guest of a chain may resize its disk, which nobody may while a snapshot is kept.
        top.set_monitor_owned(true);
        chain.graph.detach(&chain.guest).await.expect("no fault");
        let children = [(Role::File, &top), (Role::Target, &target_node)];
        let put = chain.graph.splice_in(spec, &children, |edges| {
            let (file, target) = (edges[0].clone(), edges[1].clone());
            Box::new(CopyBeforeWrite::new(handle, file, target, options))
        });
        let filter = put.await.expect("no conflict");
        chain.guest = attach(&chain.graph, &filter, SHARED);
        top.set_monitor_owned(false);
        workload.set_guest(chain.guest.clone());
        let edge = chain
            .graph
            .attach_for("access", Role::File, &filter, Permissions::NONE)
            .expect("no conflict");
        let access = Box::new(SnapshotAccess::new(edge.clone()));
        let access = insert_with(&chain.graph, "access", access, vec![edge], writable());
        Kept {
            reader: attach(&chain.graph, &access, SHARED),
            chain,
            workload,
            filter,
            target,
            before,
            random,
        }
    }

    fn snapshot(&self) -> Rc<Snapshot> {
        let driver: &CopyBeforeWrite = self.filter.driver_as().expect("it is one");
        driver.snapshot().clone()
    }

    /// Reads here and there while the guest goes on, and holds it against what was.
    async fn read_along(reader: Rc<Child>, before: Vec<u8>, mut random: Random) {
        let size = before.len() as u64;
        for _ in 0..60 {
            let start = random.below(size);
            let length = 1 + random.below((size - start).min(200 << 10));
            let bytes = MemorySlice::zeroed(length as usize);
            let read = reader.read(start, bytes.clone().into()).await;
            read.expect("no fault");
            let expected = &before[start as usize..][..length as usize];
            assert!(
                bytes.to_vec() == expected,
                "{length:#x} bytes at {start:#x} are others"
            );
            let range = ByteRange::between(start, start + length);
            let extent = reader.block_status(range).await.expect("no fault");
            let zeroes = &expected[..extent.length as usize];
            let is_zero = !matches!(extent.kind, liveblk::block::ExtentKind::Data { .. });
            assert!(
                !is_zero || zeroes.iter().all(|byte| *byte == 0),
                "{extent:?} at {start:#x}"
            );
        }
    }

    async fn assert_kept(&self, when: &str) {
        assert!(whole(&self.reader).await == self.before, "{when}");
    }

    async fn close(self) {
        let graph = &self.chain.graph;
        graph.detach(&self.reader).await.expect("no fault");
        self.chain.close().await.expect("no fault");
        assert!(graph.nodes().is_empty(), "all is closed");
        self.chain.assert_sound(false, "after closing").await;
    }
}

async fn open_target(chain: &Chain, random: &mut Random, size: u64) -> (SimulatedDisk, Rc<Node>) {
    let graph = &chain.graph;
    if random.percent(30) {
        let disk = disk_of(&chain.handle, &vec![0x99; size as usize], random.next_u64());
        let file = file_edge(graph, "target", &disk);
        let raw = Raw::open(file.clone(), RawOptions::default()).expect("no options");
        let node = insert_with(graph, "target", Box::new(raw), vec![file], writable());
        return (disk, node);
    }
    let disk = SimulatedDisk::empty(&chain.handle, random.next_u64());
    let geometry = Geometry::draw(random);
    let created = create_on(&disk, &geometry.create_options(size)).await;
    created.expect("valid options");
    let opened = open_image(graph, "target", &disk, &geometry, None, false).await;
    (disk, opened.expect("a valid image"))
}

async fn whole(edge: &Rc<Child>) -> Vec<u8> {
    let size = edge.node().size() as usize;
    let bytes = MemorySlice::zeroed(size);
    edge.read(0, bytes.clone().into()).await.expect("no fault");
    bytes.to_vec()
}

#[test]
fn what_was_stays_readable_while_a_guest_goes_on() {
    for_each_seed("what_was_stays_readable", 60, |seed| {
        simulate(seed, |handle| async move {
            let options = CbwOptions {
                min_cluster_size: [0, 0, 1 << 18, 4 << 20][seed as usize % 4],
                timeout: [None, Some(Duration::from_secs(60))][seed as usize % 2],
                ..CbwOptions::default()
            };
            let mut kept = Kept::new(&handle, seed, options, &[]).await;
            kept.assert_kept("at the start").await;
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let random = Random::new(kept.random.next_u64());
                    let along = Kept::read_along(kept.reader.clone(), kept.before.clone(), random);
                    handle.spawn(along)
                })
                .collect();
            kept.workload.run(150).await;
            for reader in readers {
                reader.await;
            }
            kept.workload.verify().await;
            kept.assert_kept("after the guest's changes").await;
            kept.close().await;
        });
    });
}

/// Each save that fails fails one change of the guest; the disk is as the guest was told, and what was stays
/// readable.
#[test]
fn a_change_that_cannot_be_saved_for_fails() {
    let mut failures = 0;
    for_each_seed("a_change_that_cannot_be_saved_for_fails", 40, |seed| {
        failures += simulate(seed, |handle| async move {
            let options = CbwOptions::default();
            let kept = Kept::new(&handle, seed, options, &[Errno::EIO, Errno::ENOSPC]).await;
            let changes = [DiskOperation::Write, DiskOperation::WriteZeroes];
            for nth in [0, 2, 5, 11] {
                kept.target.fail(Fault::once(&changes, nth, Errno::EIO));
            }
            kept.workload.run(60).await;
            kept.target.fail(Fault::from(&changes, 0, Errno::ENOSPC));
            kept.workload.run(30).await;
            kept.target.heal();
            kept.workload.run(30).await;
            assert!(kept.snapshot().failure().is_none());
            kept.workload.verify().await;
            kept.assert_kept("after the guest's changes").await;
            let failures = kept.workload.failures();
            kept.close().await;
            failures
        });
    });
    assert!(failures > 0, "no change has ever failed");
}

/// The guest never notices, and nobody is shown anything else as what was.
#[test]
fn a_snapshot_that_cannot_be_kept_ends() {
    for_each_seed("a_snapshot_that_cannot_be_kept_ends", 30, |seed| {
        simulate(seed, |handle| async move {
            let options = CbwOptions {
                on_error: OnCbwError::BreakSnapshot,
                ..CbwOptions::default()
            };
            let mut kept = Kept::new(&handle, seed, options, &[]).await;
            let nth = kept.random.below(3);
            let changes = [DiskOperation::Write, DiskOperation::WriteZeroes];
            kept.target.fail(Fault::from(&changes, nth, Errno::EIO));
            kept.workload.run(200).await;
            assert!(kept.target.faults_struck() > 0);
            let failure = kept.snapshot().failure();
            assert_eq!(failure.map(|error| error.errno()), Some(Errno::EIO));
            let bytes = MemorySlice::zeroed(512);
            let read = kept.reader.read(0, bytes.into()).await;
            assert_eq!(read.err().map(|error| error.errno()), Some(Errno::EACCES));
            kept.target.heal();
            kept.workload.verify().await;
            kept.close().await;
        });
    });
}

/// A target that does not answer holds each change up until the time is over, once where that ends the
/// snapshot, and nobody who closes has to wait for the guest.
#[test]
fn a_target_that_hangs_holds_nobody_up_for_long() {
    let limit = Duration::from_secs(2);
    let cases = [OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite];
    for (on_error, seed) in cases.into_iter().zip(1..) {
        simulate(seed, |handle| async move {
            let options = CbwOptions {
                on_error,
                timeout: Some(limit),
                ..CbwOptions::default()
            };
            let kept = Kept::new(&handle, seed, options, &[]).await;
            kept.target.set_options(DiskOptions {
                slowest: 100_000_000,
                ..kept.target.options()
            });
            let write = async || {
                let bytes = MemorySlice::zeroed(4096);
                let began = handle.now();
                let done = kept
                    .chain
                    .guest
                    .write(0, bytes.into(), Default::default())
                    .await;
                (done.map_err(|error| error.errno()), handle.now() - began)
            };
            let (first, took) = write().await;
            assert!(took >= limit && took < 2 * limit, "{took:?}");
            let (second, took) = write().await;
            match on_error {
                OnCbwError::BreakSnapshot => {
                    assert_eq!((first, second), (Ok(()), Ok(())));
                    assert!(took < limit, "{took:?}");
                    // Requests to the target are on their way; the graph changes without them.
                    let began = handle.now();
                    let drained = kept
                        .chain
                        .graph
                        .drain(std::slice::from_ref(&kept.filter))
                        .await;
                    drop(drained.expect("no fault"));
                    assert!(handle.now() - began < limit);
                }
                OnCbwError::BreakGuestWrite => {
                    assert_eq!(
                        (first, second),
                        (Err(Errno::ETIMEDOUT), Err(Errno::ETIMEDOUT))
                    );
                    kept.assert_kept("when nothing was changed").await;
                }
            }
            kept.close().await;
        });
    }
}

/// What nobody wants any more takes no space and is not saved; reading it fails.
#[test]
fn what_is_discarded_is_not_kept() {
    simulate(3, |handle| async move {
        let bytes: Vec<u8> = (0..1 << 20).map(|at| (at >> 12) as u8 | 1).collect();
        let kept = Kept::new(&handle, 3, CbwOptions::default(), &[]).await;
        let snapshot = kept.snapshot();
        let cluster = snapshot.cluster_size();
        let write = async |offset| {
            let bytes = MemorySlice::from_bytes(&bytes[..512]);
            let written = kept
                .chain
                .guest
                .write(offset, bytes.into(), Default::default());
            written.await.expect("no fault");
        };
        write(0).await;
        let live = snapshot.live_bytes();
        let gone = ByteRange::between(0, 2 * cluster);
        kept.reader.discard(gone).await.expect("no fault");
        assert_eq!(
            snapshot.live_bytes(),
            live - cluster,
            "one was saved before"
        );
        write(cluster).await;
        assert_eq!(snapshot.live_bytes(), live - cluster, "nothing to be saved");
        let read = async |offset: u64| {
            let bytes = MemorySlice::zeroed(512);
            let read = kept.reader.read(offset, bytes.into()).await;
            read.map_err(|error| error.errno())
        };
        assert_eq!(read(0).await, Err(Errno::EACCES));
        assert_eq!(read(2 * cluster - 512).await, Err(Errno::EACCES));
        assert_eq!(read(2 * cluster).await, Ok(()));
        // Parts of clusters stay.
        let part = ByteRange::between(2 * cluster + 512, 3 * cluster);
        kept.reader.discard(part).await.expect("no fault");
        assert_eq!(read(2 * cluster + 512).await, Ok(()));
        kept.close().await;
    });
}

/// A cluster that is no power of two, and one that would take all memory.
#[test]
fn odd_cluster_sizes_are_refused() {
    let says = |min_cluster_size| {
        let options = CbwOptions {
            min_cluster_size,
            ..CbwOptions::default()
        };
        options.check().map_err(|error| error.message().to_owned())
    };
    for fine in [0, 1, 1 << 16, 1 << 30] {
        assert_eq!(says(fine), Ok(()));
    }
    let refused = |text: &str| {
        Err(format!(
            "Cannot create block-copy-state: min-cluster-size {text}"
        ))
    };
    assert_eq!(says(1000), refused("needs to be a power of 2"));
    assert_eq!(
        says(1 << 40),
        refused("too large: 1099511627776 > 1073741824")
    );
}

//! The copy-on-read filter over chains of qcow2 images: what it copies, and that a guest's write that
//! comes at the same time is never lost.

use std::rc::Rc;

use liveblk::block::{ChainStatus, Child, Node, Permission, Permissions, status_above};
use liveblk::buffer::MemorySlice;
use liveblk::error::Result;
use liveblk::filter::{CopyOnRead, GuestReads};
use liveblk::range::ByteRange;
use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOptions, Model, Power, Random, Workload, WorkloadOptions, attach, for_each_seed, simulate,
};

use super::chain::{Chain, Geometry};

/// A chain of two or three layers with content, under a filter.
async fn filled(handle: &Handle, seed: u64, reads: GuestReads) -> (Chain, Workload, Rc<Node>) {
    let mut random = Random::new(seed);
    let geometry = Geometry::draw(&mut random);
    let size = (512 * (40 + random.below(900))).max(5 << geometry.cluster_bits);
    let disk_options = DiskOptions {
        request_alignment: random.choose(&[1, 512]),
        ..DiskOptions::default()
    };
    let power = Power::new();
    let mut chain = Chain::create(handle, &power, &geometry, disk_options, size, seed).await;
    let options = WorkloadOptions {
        depth: random.choose(&[2, 4, 8, 16]),
        longest: random.choose(&[4096, 32 << 10]),
        ..WorkloadOptions::default()
    };
    let model = Model::zeroed(size);
    let workload = Workload::new(handle, chain.guest.clone(), model, options, seed);
    workload.run(60 + random.below(60)).await;
    for _ in 0..1 + random.below(2) {
        chain.snapshot().await.expect("no fault");
        workload.run(random.below(40)).await;
    }
    let filter = chain
        .copy_on_read(None, reads)
        .await
        .expect("no other user");
    (chain, workload, filter)
}

/// Nothing that is read is only below `top` any more.
async fn assert_stored(top: &Rc<Node>) {
    let mut offset = 0;
    while offset < top.size() {
        let range = ByteRange::between(offset, top.size());
        let ChainStatus { extent, depth, .. } =
            status_above(top, None, range).await.expect("no fault");
        assert!(
            depth <= 1,
            "{extent:?} at {offset:#x} is still in layer {depth}"
        );
        offset += extent.length;
    }
}

#[test]
fn what_is_read_is_stored_and_guests_writes_win() {
    for_each_seed("what_is_read_is_stored_and_guests_writes_win", 40, |seed| {
        simulate(seed, |handle| async move {
            let (chain, workload, filter) = filled(&handle, seed, GuestReads::Copy).await;
            workload.run(200).await;
            workload.verify().await;
            let top = filter.without_filters();
            assert_stored(&top).await;
            workload.run(50).await;
            workload.verify().await;
            chain.close().await.expect("no fault");
            chain.assert_sound(false, "after closing").await;
        });
    });
}

/// Copies as a stream job does, in pieces of any size.
async fn fill(filter: Rc<Node>, edge: Rc<Child>, mut random: Random) -> Result<()> {
    let driver: &CopyOnRead = filter.driver_as().expect("it is one");
    let _job = edge;
    let mut start = 0;
    while start < filter.size() {
        let end = (start + 512 * (1 + random.below(200))).min(filter.size());
        let held = driver.hold(ByteRange::between(start, end)).await;
        let bytes = MemorySlice::zeroed((end - start) as usize);
        let file = driver.file();
        let ChainStatus { extent, depth, .. } =
            status_above(&file.node(), None, ByteRange::between(start, end)).await?;
        if depth > 1 {
            let piece = bytes.slice(0, extent.length as usize);
            file.read(start, piece.clone().into()).await?;
            file.write(start, piece.into(), Default::default()).await?;
        }
        drop(held);
        start += extent.length;
    }
    Ok(())
}

#[test]
fn a_job_copies_while_guests_write() {
    for_each_seed("a_job_copies_while_guests_write", 40, |seed| {
        simulate(seed, |handle| async move {
            let (chain, workload, filter) = filled(&handle, seed, GuestReads::PassBy).await;
            let edge = attach(&chain.graph, &filter, Permissions::NONE);
            let random = Random::new(seed ^ 0x5eed);
            let job = handle.spawn(fill(filter.clone(), edge.clone(), random));
            workload.run(300).await;
            job.await.expect("no fault");
            assert_stored(&filter.without_filters()).await;
            workload.verify().await;
            chain.graph.detach(&edge).await.expect("no fault");
            chain.close().await.expect("no fault");
            chain.assert_sound(false, "after closing").await;
        });
    });
}

/// Only what lies above the backing file of `bottom` is copied.
#[test]
fn layers_below_the_bottom_are_left_alone() {
    for_each_seed("layers_below_the_bottom", 10, |seed| {
        simulate(seed, |handle| async move {
            let geometry = Geometry::draw(&mut Random::new(seed));
            let cluster = 1_u64 << geometry.cluster_bits;
            let power = Power::new();
            let options = DiskOptions::default();
            let size = 4 * cluster;
            let mut chain = Chain::create(&handle, &power, &geometry, options, size, seed).await;
            let cluster_of =
                |index: u64| ByteRange::between(index * cluster, (index + 1) * cluster);
            write_cluster(&chain.guest, cluster_of(0), 1).await;
            write_cluster(&chain.guest, cluster_of(1), 1).await;
            chain.snapshot().await.expect("no fault");
            let bottom = chain.guest.node();
            write_cluster(&chain.guest, cluster_of(1), 2).await;
            write_cluster(&chain.guest, cluster_of(2), 2).await;
            chain.snapshot().await.expect("no fault");
            let top = chain.guest.node();
            let filtered = chain.copy_on_read(Some(bottom), GuestReads::Copy).await;
            filtered.expect("no other user");
            let bytes = MemorySlice::zeroed(size as usize);
            let read = chain.guest.read(0, bytes.clone().into());
            read.await.expect("no fault");
            let mut kinds = Vec::new();
            for index in 0..4 {
                let status = top.driver().block_status(cluster_of(index));
                let extent = status.await.expect("no fault");
                kinds.push(extent.is_allocated());
            }
            assert_eq!(kinds, [false, true, true, false]);
            let seen: Vec<u8> = (0..4)
                .map(|at| bytes.to_vec()[at * cluster as usize])
                .collect();
            assert_eq!(seen, [1, 2, 2, 0]);
            chain.close().await.expect("no fault");
        });
    });
}

/// A filter over the active layer of a chain of two, with the guest still beside it; the lower layer is full
/// of ones.
async fn beside(handle: &Handle, seed: u64) -> (Chain, Rc<Node>, u64) {
    let geometry = Geometry::draw(&mut Random::new(seed));
    let cluster = 1_u64 << geometry.cluster_bits;
    let (power, options) = (Power::new(), DiskOptions::default());
    let size = CLUSTERS * cluster;
    let mut chain = Chain::create(handle, &power, &geometry, options, size, seed).await;
    write_cluster(&chain.guest, ByteRange::between(0, size), 1).await;
    chain.snapshot().await.expect("no fault");
    let filter = chain.copy_on_read_beside(None, GuestReads::Copy);
    let filter = filter.expect("it needs nothing yet");
    (chain, filter, cluster)
}

const CLUSTERS: u64 = 16;

async fn write_cluster(edge: &Child, range: ByteRange, byte: u8) {
    let length = range.length() as usize;
    let bytes = MemorySlice::zeroed(length);
    bytes.fill(0, length, byte);
    let done = edge.write(range.start(), bytes.into(), Default::default());
    done.await.expect("no fault");
}

/// What a filter stores over the node of a writer that it does not see would undo what that has written a moment
/// ago. It was let do so.
#[test]
fn nobody_reads_through_the_filter_and_writes_beside_it() {
    simulate(1, |handle| async move {
        let (chain, filter, _) = beside(&handle, 1).await;
        let reads = Permissions {
            required: Permission::CONSISTENT_READ,
            ..Permissions::NONE
        };
        let refused = chain.graph.attach_root("a reader", &filter, reads);
        let error = refused.err().expect("the guest writes beside the filter");
        assert_eq!(
            error.message(),
            "Permission conflict on node 'layer1': permissions 'write' are both required by a test \
             (uses node 'layer1' as 'root' child) and unshared by node 'copy4' (uses node 'layer1' as \
             'file' child)."
        );
        chain.graph.detach(&chain.guest).await.expect("no fault");
        let reader = attach(&chain.graph, &filter, reads);
        let writes = Permissions {
            required: Permission::WRITE,
            ..Permissions::NONE
        };
        let top = filter.without_filters();
        let refused = chain.graph.attach_root("a writer", &top, writes);
        assert!(refused.is_err(), "the reader copies");
        let through = attach(&chain.graph, &filter, writes);
        chain.graph.detach(&reader).await.expect("no fault");
        let writer = attach(&chain.graph, &top, writes);
        for edge in [through, writer] {
            chain.graph.detach(&edge).await.expect("no fault");
        }
    });
}

/// Jobs read through a filter without a claim; then nobody is kept from writing beside it, and nothing is copied.
#[test]
fn a_read_without_a_claim_copies_nothing_over_a_writer() {
    for_each_seed("a_read_without_a_claim", 10, |seed| {
        simulate(seed, |handle| async move {
            let (chain, filter, cluster) = beside(&handle, seed).await;
            let reader = attach(&chain.graph, &filter, Permissions::NONE);
            let mut reads = Vec::new();
            for index in 0..CLUSTERS {
                let reader = reader.clone();
                reads.push(handle.spawn(async move {
                    let bytes = MemorySlice::zeroed(cluster as usize);
                    reader.read(index * cluster, bytes.into()).await
                }));
            }
            for index in 0..CLUSTERS {
                let range = ByteRange::between(index * cluster, (index + 1) * cluster);
                write_cluster(&chain.guest, range, 2).await;
            }
            for read in reads {
                read.await.expect("no fault");
            }
            let bytes = MemorySlice::zeroed((CLUSTERS * cluster) as usize);
            let all = chain.guest.read(0, bytes.clone().into());
            all.await.expect("no fault");
            assert!(
                bytes.to_vec().iter().all(|byte| *byte == 2),
                "a write is lost"
            );
            chain.graph.detach(&reader).await.expect("no fault");
            chain.close().await.expect("no fault");
        });
    });
}

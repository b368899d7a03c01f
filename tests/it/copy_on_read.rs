//! The copy-on-read filter over chains of qcow2 images: what it copies, and that a guest's write that
//! comes at the same time is never lost.

use std::rc::Rc;

use liveblk::block::{ChainStatus, Child, Node, Permission, Permissions, Role, status_above};
use liveblk::buffer::MemorySlice;
use liveblk::error::Result;
use liveblk::filter::{CopyOnRead, GuestReads};
use liveblk::range::ByteRange;
use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOptions, Model, Power, Random, Workload, WorkloadOptions, attach, for_each_seed,
    insert_with, simulate, writable,
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
    let filter = chain.copy_on_read(reads).await.expect("no other user");
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
            let guest = chain.guest.clone();
            let write = async |offset: u64, byte: u8| {
                let bytes = MemorySlice::zeroed(cluster as usize);
                bytes.fill(0, cluster as usize, byte);
                let done = guest.write(offset, bytes.into(), Default::default()).await;
                done.expect("no fault");
            };
            write(0, 1).await;
            write(cluster, 1).await;
            chain.snapshot().await.expect("no fault");
            let bottom = chain.guest.node();
            write(cluster, 2).await;
            write(2 * cluster, 2).await;
            chain.snapshot().await.expect("no fault");
            let top = chain.guest.node();
            let file = chain
                .graph
                .attach_for("copy", Role::File, &top, Permissions::NONE)
                .expect("no conflict");
            let driver = CopyOnRead::new(file.clone(), Some(bottom), GuestReads::Copy);
            let filter = insert_with(
                &chain.graph,
                "copy",
                Box::new(driver),
                vec![file],
                writable(),
            );
            let reads = Permissions {
                required: Permission::CONSISTENT_READ,
                ..Permissions::NONE
            };
            let reader = attach(&chain.graph, &filter, reads);
            let bytes = MemorySlice::zeroed(size as usize);
            reader
                .read(0, bytes.clone().into())
                .await
                .expect("no fault");
            let mut kinds = Vec::new();
            for index in 0..4 {
                let range = ByteRange::between(index * cluster, (index + 1) * cluster);
                let extent = top.driver().block_status(range).await.expect("no fault");
                kinds.push(extent.is_allocated());
            }
            assert_eq!(kinds, [false, true, true, false]);
            let seen: Vec<u8> = (0..4)
                .map(|at| bytes.to_vec()[at * cluster as usize])
                .collect();
            assert_eq!(seen, [1, 2, 2, 0]);
            chain.graph.detach(&reader).await.expect("no fault");
            chain.close().await.expect("no fault");
        });
    });
}

//! Requests that overlap others in flight, on disks where some operations take far longer than the rest.

use std::rc::Rc;

use liveblk::block::{Graph, WriteFlags};
use liveblk::buffer::MemorySlice;
use liveblk::format::raw::{Raw, RawOptions};
use liveblk::range::ByteRange;
use liveblk::testing::{
    DiskOptions, Model, Power, Random, Request, SimulatedDisk, VolatileStore, Workload,
    WorkloadOptions, attach, attach_file, for_each_seed, full_access, insert, insert_with,
    simulate, writable,
};

use super::chain::{Chain, Geometry};

/// A cluster that was given up must not be used again while a slow transfer to it is in flight: that
/// would end up in what another part of the disk has there by then.
#[test]
fn a_straggler_does_not_hit_a_cluster_that_is_used_again() {
    for_each_seed("a_straggler_does_not_hit", 30, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let geometry = Geometry {
                cluster_bits: random.choose(&[9, 12]),
                ..Geometry::draw(&mut random)
            };
            let disk = DiskOptions {
                stragglers: 2,
                garbles_discards: true,
                ..DiskOptions::default()
            };
            let size = 96 << geometry.cluster_bits;
            let power = Power::new();
            let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
            let options = WorkloadOptions {
                depth: 8,
                longest: 8 << geometry.cluster_bits,
                races: 60,
                mix: vec![
                    (Request::Write, 50),
                    (Request::Read, 10),
                    (Request::ZeroUnmap, 15),
                    (Request::Discard, 15),
                    (Request::Flush, 15),
                ],
                ..WorkloadOptions::default()
            };
            let model = Model::zeroed(size);
            let workload = Workload::new(&handle, chain.guest.clone(), model, options, seed);
            for _ in 0..4 {
                workload.run(250).await;
                workload.verify().await;
            }
            chain.close().await.expect("no fault");
            chain.assert_sound(false, "after closing").await;
        });
    });
}

/// A discard used to go past a write that is padded to whole blocks: between that one's reading and
/// writing, so that what had been discarded, and read as zeroes, came back.
#[test]
fn a_discard_waits_for_a_padded_write_to_the_same_block() {
    for_each_seed("a_discard_waits_for_a_padded_write", 40, |seed| {
        simulate(seed, |handle| async move {
            let options = DiskOptions {
                request_alignment: 4096,
                garbles_discards: false,
                ..DiskOptions::default()
            };
            let content = VolatileStore::from_bytes(&[7; 8192]);
            let disk = SimulatedDisk::new(&handle, &Power::new(), options, content, seed);
            let graph = Graph::new();
            let node = insert(&graph, "disk", disk.driver());
            let guest = attach(&graph, &node, full_access());
            let writer = guest.clone();
            let write = handle.spawn(async move {
                let payload = MemorySlice::from_bytes(&[9; 512]).into();
                writer.write(512, payload, WriteFlags::empty()).await
            });
            let block = ByteRange::between(0, 4096);
            guest.discard(block).await.expect("no fault");
            let seen = block_of(&guest).await;
            write.await.expect("no fault");
            let after = block_of(&guest).await;
            assert_eq!(after[512..1024], [9; 512]);
            assert_eq!(seen[1024..], after[1024..], "it changed after the discard");
        });
    });
}

async fn block_of(guest: &Rc<liveblk::block::Child>) -> Vec<u8> {
    let buffer = MemorySlice::zeroed(4096);
    let read = guest.read(0, buffer.clone().into()).await;
    read.expect("no fault");
    buffer.to_vec()
}

/// Writes of whole blocks go past a raw node, and others were padded at it, out of their sight: a write
/// of whole blocks was lost when a smaller one to the same block was between its reading and writing.
#[test]
fn a_padded_write_over_raw_loses_no_other_write() {
    for_each_seed("a_padded_write_over_raw", 40, |seed| {
        simulate(seed, |handle| async move {
            let options = DiskOptions {
                request_alignment: 4096,
                ..DiskOptions::default()
            };
            let content = VolatileStore::from_bytes(&[7; 8192]);
            let disk = SimulatedDisk::new(&handle, &Power::new(), options, content, seed);
            let graph = Graph::new();
            let below = insert(&graph, "disk", disk.driver());
            let file = attach_file(&graph, &below);
            let driver = Raw::open(file.clone(), RawOptions::default()).expect("a plain disk");
            let node = insert_with(&graph, "raw", Box::new(driver), vec![file], writable());
            let guest = attach(&graph, &node, full_access());
            let writer = guest.clone();
            let small = handle.spawn(async move {
                let payload = MemorySlice::from_bytes(&[9; 512]).into();
                writer.write(512, payload, WriteFlags::empty()).await
            });
            let payload = MemorySlice::from_bytes(&[8; 4096]).into();
            let whole = guest.write(0, payload, WriteFlags::empty()).await;
            whole.expect("no fault");
            small.await.expect("no fault");
            let after = block_of(&guest).await;
            assert_eq!(after[1024..], [8; 3072], "the write of the whole block");
        });
    });
}

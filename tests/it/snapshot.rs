//! Snapshots while writers, readers and flushes go on, held against the reference model.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk::block::{Child, WriteFlags, ZeroFlags};
use liveblk::blockdev::SnapshotSync;
use liveblk::buffer::MemorySlice;
use liveblk::range::ByteRange;
use liveblk::testing::{Model, Random, for_each_seed, scale, stamped};

use crate::images::{Images, with_images};

const SIZE: u64 = 4 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 8;
const SNAPSHOTS: usize = 12;

/// What the writers share.
struct Load {
    edge: Rc<Child>,
    model: RefCell<Model>,
    stamp: Cell<u32>,
    stop: Cell<bool>,
    requests: Cell<u64>,
}

impl Load {
    /// One request after the other until told to stop.
    async fn run(self: Rc<Self>, mut random: Random) {
        while !self.stop.get() {
            let start = random.below(SIZE / BLOCK) * BLOCK;
            let length = (1 + random.below(32)) * BLOCK;
            let range = ByteRange::between(start, (start + length).min(SIZE));
            match random.below(10) {
                0..5 => self.write(range).await,
                5 => self.zero(range, &mut random).await,
                6 => self.flush().await,
                _ => drop(self.read(range).await),
            }
            self.requests.set(self.requests.get() + 1);
        }
    }

    async fn write(&self, range: ByteRange) {
        let stamp = self.stamp.get() + 1;
        self.stamp.set(stamp);
        let bytes = stamped(stamp, &range);
        let pending = self.model.borrow_mut().begin_write(range.start(), &bytes);
        let data = MemorySlice::from_bytes(&bytes);
        let written = self
            .edge
            .write(range.start(), data.into(), WriteFlags::empty())
            .await;
        written.expect("write");
        self.model.borrow_mut().end(pending, true);
    }

    async fn zero(&self, range: ByteRange, random: &mut Random) {
        let pending = self.model.borrow_mut().begin_zeroes(range);
        let flags = if random.percent(50) {
            ZeroFlags::MAY_UNMAP
        } else {
            ZeroFlags::empty()
        };
        self.edge.write_zeroes(range, flags).await.expect("zeroes");
        self.model.borrow_mut().end(pending, true);
    }

    async fn flush(&self) {
        let pending = self.model.borrow_mut().begin_flush();
        self.edge.flush().await.expect("flush");
        self.model.borrow_mut().end_flush(pending);
    }

    /// Only a read of the whole disk while nobody writes is checked: one among writers may return
    /// what was current at any moment in between.
    async fn read(&self, range: ByteRange) -> Vec<u8> {
        let data = MemorySlice::zeroed(range.length() as usize);
        self.edge
            .read(range.start(), data.clone().into())
            .await
            .expect("read");
        data.to_vec()
    }

    async fn check(&self) {
        let bytes = self.read(ByteRange::between(0, SIZE)).await;
        let checked = self.model.borrow_mut().check_read(0, &bytes);
        checked.unwrap_or_else(|mismatch| panic!("{mismatch}"));
    }
}

fn name_of(layer: usize) -> String {
    format!("layer{layer}")
}

async fn snapshot(images: &Images, layer: usize) {
    let request = SnapshotSync {
        node_name: Some(name_of(layer)),
        snapshot_file: images.path(&format!("{}.qcow2", name_of(layer + 1))),
        snapshot_node_name: Some(name_of(layer + 1)),
        ..SnapshotSync::default()
    };
    images
        .blockdev
        .snapshot_sync(request)
        .await
        .expect("snapshot");
}

#[test]
fn snapshots_under_load_lose_and_change_nothing() {
    for_each_seed("snapshots_under_load", 2, |seed| {
        with_images(seed, |images| async move { under_load(images, seed).await });
    });
}

async fn under_load(images: Images, seed: u64) {
    images.create("layer0.qcow2", &SIZE.to_string());
    let node = images.open("layer0").await;
    let load = Rc::new(Load {
        edge: images.attach(&node),
        model: RefCell::new(Model::zeroed(SIZE)),
        stamp: Cell::new(0),
        stop: Cell::new(false),
        requests: Cell::new(0),
    });
    let mut random = Random::new(seed);
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| images.handle.spawn(load.clone().run(random.fork())))
        .collect();
    let snapshots = SNAPSHOTS * scale() as usize;
    let mut frozen = Vec::new();
    for layer in 0..snapshots {
        let before = load.requests.get();
        while load.requests.get() < before + 20 {
            images.handle.yield_now().await;
        }
        snapshot(&images, layer).await;
        frozen.push(std::fs::read(images.path(&format!("layer{layer}.qcow2"))).expect("read"));
    }
    load.stop.set(true);
    for writer in writers {
        writer.await;
    }
    load.check().await;
    for (layer, bytes) in frozen.iter().enumerate() {
        let now = std::fs::read(images.path(&format!("layer{layer}.qcow2"))).expect("read");
        assert!(
            now == *bytes,
            "layer {layer} was written to after its snapshot"
        );
    }
    close_and_check(&images, &load, snapshots).await;
}

/// Everything is clean, and the chain on disk, opened anew, reads as the model says.
async fn close_and_check(images: &Images, load: &Rc<Load>, top: usize) {
    images
        .blockdev
        .graph()
        .detach(&load.edge)
        .await
        .expect("detach");
    images.blockdev.close_all().await.expect("close");
    assert!(images.blockdev.graph().nodes().is_empty());
    for layer in 0..=top {
        let name = format!("layer{layer}.qcow2");
        images.must("qemu-img", &["check", "-q", &name]);
    }
    let node = images.open(&name_of(top)).await;
    let again = Load {
        edge: images.attach(&node),
        model: RefCell::new(load.model.borrow().clone()),
        stamp: Cell::new(0),
        stop: Cell::new(true),
        requests: Cell::new(0),
    };
    again.check().await;
}

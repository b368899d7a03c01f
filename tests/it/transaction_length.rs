//! How long guests wait for a transaction: measured, not tested. Run it with
//! `cargo nextest run --all-features --run-ignored only --no-capture transaction_length`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use liveblk::block::{Action, Child, WriteFlags};
use liveblk::blockdev::{BitmapChange, BitmapName, NewBitmap, SnapshotSync};
use liveblk::buffer::MemorySlice;

use crate::images::{Images, with_images};

const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// Blocks that each guest writes, in turn.
const BLOCKS: u64 = 4096;
const ROUNDS: usize = 30;
/// Writes in flight of each guest.
const DEPTH: u64 = 4;

/// Guests that write, one for each node, and the longest of their writes since one looked.
struct Guests {
    edges: Vec<Rc<Child>>,
    stop: Cell<bool>,
    longest: Cell<Duration>,
}

impl Guests {
    async fn write(self: Rc<Self>, images: Images, index: usize, first: u64) {
        let data = MemorySlice::zeroed(BLOCK as usize);
        let mut block = first;
        while !self.stop.get() {
            let began = images.handle.now();
            let offset = (block % BLOCKS) * BLOCK;
            let written = self.edges[index].write(offset, data.clone().into(), WriteFlags::empty());
            written.await.expect("write");
            let took = images.handle.now() - began;
            self.longest.set(self.longest.get().max(took));
            block += DEPTH;
        }
    }
}

/// What the measured transactions do with each node.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Snapshots,
    /// The first bitmap's bits go to the second, and it is cleared.
    Rotation {
        persistent: bool,
    },
}

impl Kind {
    async fn actions(self, images: &Images, edge: &Child, round: usize) -> Vec<Box<dyn Action>> {
        let node = edge.node().name().to_owned();
        match self {
            Kind::Snapshots => {
                let name = format!("{}-{round}", node.split('-').next().unwrap_or_default());
                let request = SnapshotSync {
                    node_name: Some(node),
                    snapshot_file: images.path(&format!("{name}.qcow2")),
                    snapshot_node_name: Some(name),
                    ..SnapshotSync::default()
                };
                let prepared = images.blockdev.prepare_snapshot_sync(request).await;
                vec![Box::new(prepared.expect("prepared"))]
            }
            Kind::Rotation { .. } => {
                let named = |name: &str| BitmapName {
                    node: node.clone(),
                    name: name.into(),
                };
                let merge = BitmapChange::Merge {
                    target: named("second"),
                    sources: vec![named("first")],
                };
                let clear = BitmapChange::Clear(named("first"));
                let changes = [merge, clear].into_iter();
                changes
                    .map(|change| {
                        Box::new(images.blockdev.prepare_bitmap(change)) as Box<dyn Action>
                    })
                    .collect()
            }
        }
    }

    async fn set_up(self, images: &Images, node: &str) {
        let Kind::Rotation { persistent } = self else {
            return;
        };
        for name in ["first", "second"] {
            let new = NewBitmap {
                node: node.into(),
                name: name.into(),
                granularity: None,
                persistent,
                disabled: name == "second",
            };
            let added = images.blockdev.change_bitmap(BitmapChange::Add(new)).await;
            added.expect("a bitmap");
        }
    }
}

async fn measure(images: Images, kind: Kind, nodes: usize) {
    let mut edges = Vec::new();
    for index in 0..nodes {
        let name = format!("n{index}");
        images.create(&format!("{name}.qcow2"), &SIZE.to_string());
        edges.push(images.attach(&images.open(&name).await));
        kind.set_up(&images, &name).await;
    }
    let guests = Rc::new(Guests {
        edges,
        stop: Cell::default(),
        longest: Cell::default(),
    });
    let writers: Vec<_> = (0..nodes)
        .flat_map(|index| (0..DEPTH).map(move |first| (index, first)))
        .map(|(index, first)| {
            let write = guests.clone().write(images.clone(), index, first);
            images.handle.spawn(write)
        })
        .collect();
    images.handle.sleep(Duration::from_millis(300)).await;
    let usual = guests.longest.take();
    let (took, waited) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    for round in 0..ROUNDS {
        let mut actions = Vec::new();
        for edge in &guests.edges {
            actions.extend(kind.actions(&images, edge, round).await);
        }
        images.handle.sleep(Duration::from_millis(20)).await;
        guests.longest.set(Duration::ZERO);
        let began = images.handle.now();
        let done = images.blockdev.graph().transact(&actions).await;
        done.expect("a transaction");
        took.borrow_mut().push(images.handle.now() - began);
        images.handle.sleep(Duration::from_millis(5)).await;
        waited.borrow_mut().push(guests.longest.take());
    }
    guests.stop.set(true);
    for writer in writers {
        writer.await;
    }
    let figures = |list: RefCell<Vec<Duration>>| {
        let mut list = list.take();
        list.sort();
        format!(
            "median {:.2?}, longest {:.2?}",
            list[ROUNDS / 2],
            list[ROUNDS - 1]
        )
    };
    println!(
        "{kind:?}, {nodes} nodes: a transaction takes {}; the longest write then {} (without: {usual:.2?})",
        figures(took),
        figures(waited)
    );
}

#[test]
#[ignore = "it measures, and prints what it has measured"]
fn transaction_length() {
    for kind in [
        Kind::Snapshots,
        Kind::Rotation { persistent: false },
        Kind::Rotation { persistent: true },
    ] {
        for nodes in [1, 4, 16] {
            with_images(1, |images| measure(images, kind, nodes));
        }
    }
}

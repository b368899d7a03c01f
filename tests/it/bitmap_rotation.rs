//! Transactions that rotate persistent bitmaps, on a simulated disk: whatever happens to the power or to the
//! disk, no change is lost between the bitmap that gives it away and the one that gets it.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk::block::{Action, Bitmap, BitmapFlags, Child, DirtyBitmap, Graph, Node};
use liveblk::blockdev::{BitmapChange, BitmapName, Blockdev, NewBitmap};
use liveblk::error::Result as BlockResult;
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, Workload, WorkloadOptions,
    for_each_seed, simulate,
};
use nix::errno::Errno;

use super::bitmaps::{content, first_unmarked, image_for_bitmaps};
use super::chain::Chain;
use super::crashes;

/// A disk with a bitmap that records, one that collects what that has recorded, and one that comes anew with
/// each rotation, instead of the last.
#[derive(Clone)]
pub(crate) struct Rotation {
    guest: Rc<Child>,
    pub(crate) workload: Workload,
    blockdev: Blockdev,
    pub(crate) told: Rc<RefCell<Told>>,
}

/// What the bitmaps must know of.
#[derive(Clone, Default)]
pub(crate) struct Told {
    /// The disk when recording began.
    first: Vec<u8>,
    /// The disk at each rotation.
    rotations: Vec<Vec<u8>>,
    /// Rotations that were answered.
    answered: usize,
}

impl Rotation {
    /// On the guest's node.
    pub(crate) fn new(
        handle: &Handle,
        graph: &Graph,
        guest: &Rc<Child>,
        workload: Workload,
    ) -> Rotation {
        Rotation {
            blockdev: Blockdev::new(handle, graph),
            told: Rc::default(),
            guest: guest.clone(),
            workload,
        }
    }

    fn of(chain: &Chain, workload: Workload) -> Rotation {
        Rotation::new(&chain.handle, &chain.graph, &chain.guest, workload)
    }

    fn node(&self) -> Rc<Node> {
        self.guest.node()
    }

    fn named(&self, name: &str) -> BitmapName {
        BitmapName {
            node: self.node().name().to_owned(),
            name: name.into(),
        }
    }

    fn added(&self, name: &str, granularity: u32, disabled: bool) -> BitmapChange {
        BitmapChange::Add(NewBitmap {
            node: self.node().name().to_owned(),
            name: name.into(),
            granularity: Some(granularity),
            persistent: true,
            disabled,
        })
    }

    pub(crate) async fn begin(&self) {
        self.workload.run(15).await;
        self.told.borrow_mut().first = content(&self.node()).await;
        self.told.borrow_mut().rotations = vec![content(&self.node()).await];
        for change in [
            self.added("archive", 512, true),
            self.added("current", 4096, false),
            self.added("extra0", 65536, false),
        ] {
            self.blockdev.change_bitmap(change).await.expect("no fault");
        }
        self.told.borrow_mut().answered = 1;
    }

    /// The archive gets what was recorded, and recording begins anew.
    async fn rotate(&self) -> BlockResult<()> {
        let now = content(&self.node()).await;
        let number = {
            let mut told = self.told.borrow_mut();
            let number = told.answered;
            told.rotations.truncate(number);
            told.rotations.push(now);
            number
        };
        let changes = [
            self.added(&format!("extra{number}"), 65536, false),
            BitmapChange::Merge {
                target: self.named("archive"),
                sources: vec![self.named("current")],
            },
            BitmapChange::Clear(self.named("current")),
            BitmapChange::Remove(self.named(&format!("extra{}", number - 1))),
        ];
        let actions: Vec<Box<dyn Action>> = changes
            .into_iter()
            .map(|change| Box::new(self.blockdev.prepare_bitmap(change)) as Box<dyn Action>)
            .collect();
        self.blockdev.graph().transact(&actions).await?;
        self.told.borrow_mut().answered = number + 1;
        Ok(())
    }

    pub(crate) async fn live(&self) {
        for _ in 0..3 {
            self.workload.run(15).await;
            self.rotate().await.expect("no fault");
        }
        self.workload.run(5).await;
    }
}

/// Of a bitmap that is there and good.
pub(crate) fn bits_of(node: &Node, name: &str) -> Result<DirtyBitmap, String> {
    let bitmap = node.bitmaps().find(name).ok_or(format!("{name} is lost"))?;
    match bitmap.is(BitmapFlags::INCONSISTENT) {
        true => Err(format!("{name} is inconsistent")),
        false => Ok(bitmap.with_bits(DirtyBitmap::clone)),
    }
}

impl Told {
    /// What the bitmaps say covers all that has changed; answers how many bytes they leave out.
    pub(crate) fn check(&self, node: &Node, now: &[u8]) -> Result<u64, String> {
        let mut all = bits_of(node, "archive")?;
        all.merge(&bits_of(node, "current")?);
        if let Some(offset) = first_unmarked(&all, &self.first, now) {
            return Err(format!("{offset:#x} is neither archived nor current"));
        }
        let mut found = 0;
        for (number, before) in self.rotations.iter().enumerate() {
            let Ok(bits) = bits_of(node, &format!("extra{number}")) else {
                continue;
            };
            found += 1;
            if let Some(offset) = first_unmarked(&bits, before, now) {
                return Err(format!("extra{number} does not know of {offset:#x}"));
            }
        }
        if found == 0 || found > 2 {
            return Err(format!("{found} bitmaps of {}", self.rotations.len()));
        }
        Ok(all.size() - all.dirty_bytes().min(all.size()))
    }
}

/// After a crash at an operation, or none, the bitmaps know of all changes. Answers how many operations there
/// were, and how many bytes the bitmaps left out.
fn crash_at(seed: u64, operation: Option<u64>, disk: DiskOptions) -> Result<(u64, u64), String> {
    let (geometry, size) = image_for_bitmaps(seed);
    let runtime = Runtime::simulated(seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let (chain, rotation) = runtime.block_on(async {
        let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
        let (guest, model) = (chain.guest.clone(), Model::zeroed(size));
        let options = WorkloadOptions::default();
        let workload = Workload::new(&handle, guest, model, options, seed);
        let rotation = Rotation::of(&chain, workload);
        rotation.begin().await;
        (chain, rotation)
    });
    let begun = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    runtime.block_on(power.run(rotation.live()));
    let operations = power.operations() - begun;
    let left = chain.crash(&mut Random::new(seed ^ operation.unwrap_or(0) << 20));
    let told = rotation.told.borrow().clone();
    simulate(seed, async |handle| {
        let sound = DiskOptions {
            ignores_flush: false,
            ..disk
        };
        let chain = Chain::open(&handle, &Power::new(), &geometry, sound, left, seed).await;
        let chain = chain.map_err(|error| error.to_string())?;
        let node = chain.guest.node();
        let now = content(&node).await;
        let clean = told.check(&node, &now)?;
        chain.close().await.map_err(|error| error.to_string())?;
        chain.assert_sound(true, "after the restart").await;
        Ok((operations, clean))
    })
}

fn sweep(seed: u64, crashes: u64, disk: DiskOptions) -> Result<u64, String> {
    crashes::sweep(seed, crashes, |operation| crash_at(seed, operation, disk))
}

/// Power fails anywhere in a life with three rotations.
#[test]
fn a_rotation_loses_nothing_in_a_crash_anywhere() {
    for_each_seed("a_rotation_loses_nothing", 10, |seed| {
        match sweep(seed, 60, DiskOptions::default()) {
            Ok(clean) => assert!(clean > 0, "all is dirty always"),
            Err(wrong) => panic!("{wrong}"),
        }
    });
}

/// The canary: without barriers changes are lost.
#[test]
fn a_disk_that_ignores_flushes_makes_rotations_lose_changes() {
    let disk = DiskOptions {
        ignores_flush: true,
        ..DiskOptions::default()
    };
    let noticed = (1..=6).filter(|seed| sweep(*seed, 40, disk).is_err());
    assert!(noticed.count() >= 4);
}

/// Bits and states of all bitmaps, by name.
fn states(node: &Node) -> Vec<(String, BitmapFlags, DirtyBitmap)> {
    let state = |bitmap: &Rc<Bitmap>| {
        let bits = bitmap.with_bits(DirtyBitmap::clone);
        (bitmap.name().to_owned(), bitmap.flags(), bits)
    };
    let mut all: Vec<_> = node.bitmaps().all().iter().map(state).collect();
    all.sort_by_key(|(name, _, _)| name.clone());
    all
}

/// One request of the disk fails in the transaction: nothing has changed, then or in what is stored; and a
/// crash after that loses nothing.
#[test]
fn a_rotation_that_fails_has_changed_nothing() {
    for_each_seed("a_rotation_that_fails", 6, |seed| {
        let failed = (0..25).filter(|nth| fault_at(seed, *nth)).count();
        assert!(failed > 5, "{failed} rotations have failed");
    });
}

/// Answers whether the rotation has failed.
fn fault_at(seed: u64, nth: u64) -> bool {
    simulate(seed, async |handle| {
        let (geometry, size) = image_for_bitmaps(seed);
        let (power, disk) = (Power::new(), DiskOptions::default());
        let chain = Chain::create(&handle, &power, &geometry, disk, size, seed).await;
        let (guest, model) = (chain.guest.clone(), Model::zeroed(size));
        let options = WorkloadOptions::default();
        let workload = Workload::new(&handle, guest, model, options, seed);
        let rotation = Rotation::of(&chain, workload);
        rotation.begin().await;
        rotation.workload.run(15).await;
        let before = states(&rotation.node());
        let kinds = [DiskOperation::Write, DiskOperation::Flush];
        chain.disks[0].fail(Fault::once(&kinds, nth, Errno::EIO));
        let rotated = rotation.rotate().await;
        chain.disks[0].heal();
        if rotated.is_err() {
            assert_eq!(states(&rotation.node()), before, "fault {nth}");
        }
        rotation.workload.run(10).await;
        rotation.workload.verify().await;
        let left = chain.crash(&mut Random::new(seed ^ nth));
        let opened = Chain::open(&handle, &Power::new(), &geometry, disk, left, seed).await;
        let opened = opened.expect("it can be opened");
        let (node, told) = (opened.guest.node(), rotation.told.borrow().clone());
        let checked = told.check(&node, &content(&node).await);
        assert!(checked.is_ok(), "fault {nth}: {checked:?}");
        opened.close().await.expect("no fault");
        opened.assert_sound(true, "after a fault and a crash").await;
        rotated.is_err()
    })
}

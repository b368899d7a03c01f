//! Crash and fault sweeps over chains of qcow2 images.
//!
//! After a crash at any disk operation the images have at most leaks, can be opened, and hold
//! everything that was flushed. After a fault at any disk operation the caller got an error, the
//! device lives on and nothing is lost.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk::filter::GuestReads;
use liveblk::runtime::{Handle, Runtime};
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, Request, VolatileStore, Workload,
    WorkloadOptions, for_each_seed, simulate,
};
use nix::errno::Errno;

use super::chain::{Chain, Geometry};
use crate::crashes;

mod reopen;
mod resize;

/// What a run of the crash sweep is about.
#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    geometry: Geometry,
    disk: DiskOptions,
    workload: WorkloadOptions,
    size: u64,
    rounds: u64,
    /// Each overlay is filled by what is read through it.
    copy_on_read: bool,
}

impl Plan {
    fn draw(seed: u64) -> Plan {
        let mut random = Random::new(seed);
        let geometry = Geometry::draw(&mut random);
        let clusters = 12 + random.below(60);
        let size = ((clusters << geometry.cluster_bits) + 512 * random.below(2)).min(1 << 20);
        Plan {
            seed,
            disk: DiskOptions {
                request_alignment: random.choose(&[1, 512]),
                native_fua: random.percent(50),
                write_zeroes: random.percent(70),
                ..DiskOptions::default()
            },
            workload: WorkloadOptions {
                depth: random.choose(&[1, 2, 4, 8]),
                longest: random.choose(&[2048, 8192, 64 << 10]),
                ..WorkloadOptions::default()
            },
            size,
            rounds: 2 + random.below(4),
            copy_on_read: false,
            geometry,
        }
    }
}

impl Plan {
    /// Small clusters that come and go, through caches that overflow all the time: clusters are used
    /// again soon, and refcount blocks are added often.
    fn churn(seed: u64) -> Plan {
        let mut plan = Plan::draw(seed);
        plan.geometry = Geometry {
            version: 3,
            cluster_bits: 9 + (seed % 2) as u32,
            refcount_bits: if seed.is_multiple_of(3) { 16 } else { 64 },
            lazy_refcounts: false,
            tiny_caches: true,
            pass_discard: seed.is_multiple_of(4),
        };
        plan.size = 1 << 20;
        plan.rounds = 5;
        plan.workload.longest = 32 << 10;
        plan.workload.mix = vec![
            (Request::Read, 2),
            (Request::Write, 40),
            (Request::ZeroUnmap, 15),
            (Request::Discard, 30),
            (Request::Flush, 2),
        ];
        plan
    }
}

impl Plan {
    /// The smallest clusters and the widest refcounts under a large disk: refcount and L1 table are
    /// replaced by longer ones, and the header changes.
    fn growing_tables(seed: u64) -> Plan {
        let mut plan = Plan::draw(seed);
        plan.geometry = Geometry {
            version: 3,
            cluster_bits: 9,
            refcount_bits: 64,
            lazy_refcounts: false,
            tiny_caches: seed.is_multiple_of(2),
            pass_discard: true,
        };
        plan.size = 3 << 20;
        plan.rounds = 3;
        plan.workload.longest = 256 << 10;
        plan.workload.mix = vec![
            (Request::Write, 60),
            (Request::Discard, 3),
            (Request::Flush, 2),
        ];
        plan
    }
}

/// The state of the machine that a crash leaves to the next start: which disks the chain has, and
/// what the guest was promised.
struct Machine {
    chain: Chain,
    workload: Workload,
}

/// The guest's doings; at any of its disk operations power may fail.
async fn doings(machine: Rc<RefCell<Machine>>, plan: Plan) {
    let mut random = Random::new(plan.seed ^ 0xd01);
    for _ in 0..plan.rounds {
        let workload = machine.borrow().workload.clone();
        workload.run(10 + random.below(40)).await;
        match random.below(5) {
            0 => snapshot(&machine, plan.copy_on_read).await,
            1 => {
                let sectors = plan.size / 1024 + random.below(plan.size / 512);
                workload.resize(sectors * 512).await;
            }
            2 => drop(workload.flush().await),
            _ => {}
        }
    }
    let chain = machine.borrow().chain.guest.clone();
    chain.flush().await.expect("no fault");
}

/// The overlay belongs to the chain once the snapshot is done; before, nothing is written to it.
#[expect(
    clippy::await_holding_refcell_ref,
    reason = "nobody else borrows meanwhile"
)]
async fn snapshot(machine: &Rc<RefCell<Machine>>, copy_on_read: bool) {
    let mut machine = machine.borrow_mut();
    if machine.chain.disks.len() < 4 {
        machine.chain.snapshot().await.expect("no fault");
        if copy_on_read {
            let filter = machine.chain.copy_on_read(None, GuestReads::Copy).await;
            filter.expect("no fault");
        }
    }
}

/// Runs until power fails at an operation (or to the end), then starts again on what is left.
/// Returns how many operations there were, and what is wrong after the restart.
fn crash_at(plan: &Plan, operation: Option<u64>) -> (Run, Result<(), String>) {
    let runtime = Runtime::simulated(plan.seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let machine = runtime.block_on(async {
        let Plan {
            geometry,
            disk,
            size,
            seed,
            ..
        } = plan;
        let chain = Chain::create(&handle, &power, geometry, *disk, *size, *seed).await;
        let model = Model::zeroed(*size);
        let guest = chain.guest.clone();
        let workload = Workload::new(&handle, guest, model, plan.workload.clone(), *seed);
        Rc::new(RefCell::new(Machine { chain, workload }))
    });
    let before = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    runtime.block_on(power.run(doings(machine.clone(), plan.clone())));
    let run = Run {
        operations: power.operations() - before,
        header_changes: power.header_changes(),
        before,
    };
    let machine = machine.borrow();
    let mut random = Random::new(plan.seed ^ operation.unwrap_or(0) << 20);
    let left = machine.chain.crash(&mut random);
    let model = machine.workload.model().clone();
    (run, restart(plan, left, model, random.next_u64()))
}

/// What a run did to its disks.
struct Run {
    operations: u64,
    header_changes: Vec<u64>,
    /// Operations that were over before the guest's doings began.
    before: u64,
}

impl Run {
    /// Operations around those that changed a header, counted from the doings' first.
    fn around_header_changes(&self) -> Vec<u64> {
        let changes = self.header_changes.iter();
        let started = changes.filter_map(|change| change.checked_sub(self.before));
        let mut near: Vec<u64> = started
            .flat_map(|change| change.saturating_sub(2)..=change + 3)
            .filter(|operation| (1..=self.operations).contains(operation))
            .collect();
        near.dedup();
        near
    }
}

/// Everything that must hold after a crash.
fn restart(
    plan: &Plan,
    left: Vec<VolatileStore>,
    mut model: Model,
    seed: u64,
) -> Result<(), String> {
    let sound_disk = DiskOptions {
        ignores_flush: false,
        ..plan.disk
    };
    simulate(seed, |handle: Handle| async move {
        let power = Power::new();
        for (depth, store) in left.iter().enumerate() {
            let disk = liveblk::testing::SimulatedDisk::new(
                &handle,
                &power,
                sound_disk,
                store.clone(),
                seed,
            );
            let result = super::chain::check_disk(&disk).await;
            let result = result.map_err(|error| format!("layer {depth}: {error}"))?;
            // Under the dirty mark refcounts may be too low until the next opening.
            if !result.is_safe() && !is_dirty(store) {
                return Err(format!("layer {depth}: {result:#?}"));
            }
        }
        let chain = Chain::open(&handle, &power, &plan.geometry, sound_disk, left, seed).await;
        let chain = chain.map_err(|error| format!("cannot be opened: {error}"))?;
        let bytes = whole(&chain).await?;
        let judged = model.check_after_crash(&bytes);
        judged.map_err(|mismatch| mismatch.to_string())?;
        let guest = chain.guest.clone();
        let workload = Workload::new(&handle, guest, model, plan.workload.clone(), seed);
        workload.run(40).await;
        workload.verify().await;
        chain.close().await.map_err(|error| error.to_string())?;
        chain.assert_sound(true, "after the restart").await;
        Ok(())
    })
}

/// The image of a version 3 header has the dirty mark.
fn is_dirty(store: &VolatileStore) -> bool {
    let mut header = [0; 80];
    store.read(0, &mut header);
    header[7] >= 3 && header[79] & 1 != 0
}

async fn whole(chain: &Chain) -> Result<Vec<u8>, String> {
    let length = chain.guest.node().size() as usize;
    let buffer = liveblk::buffer::MemorySlice::zeroed(length);
    let read = chain.guest.read(0, buffer.clone().into()).await;
    read.map_err(|error| format!("cannot be read: {error}"))?;
    Ok(buffer.to_vec())
}

/// Crashes at so many operations spread over a run, and tells what went wrong first.
fn crash_sweep(plan: &Plan, crashes: u64) -> Result<(), String> {
    let (run, outcome) = crash_at(plan, None);
    outcome.map_err(|wrong| format!("crash at the end: {wrong}"))?;
    let operations = run.operations;
    let spread = crashes::points(plan.seed, operations, crashes);
    for operation in spread.chain(run.around_header_changes()) {
        let (_, outcome) = crash_at(plan, Some(operation));
        outcome.map_err(|wrong| format!("crash at {operation} of {operations}: {wrong}"))?;
    }
    Ok(())
}

#[test]
fn flushed_data_survives_a_crash_anywhere() {
    for_each_seed("flushed_data_survives_a_crash_anywhere", 15, |seed| {
        let plan = Plan::draw(seed);
        if let Err(wrong) = crash_sweep(&plan, 20) {
            panic!("{wrong}\n{plan:?}");
        }
    });
}

#[test]
fn clusters_used_again_survive_a_crash_anywhere() {
    for_each_seed("clusters_used_again_survive", 8, |seed| {
        let plan = Plan::churn(seed);
        if let Err(wrong) = crash_sweep(&plan, 60) {
            panic!("{wrong}\n{plan:?}");
        }
    });
}

#[test]
fn growing_tables_survive_a_crash_anywhere() {
    for_each_seed("growing_tables_survive", 6, |seed| {
        let plan = Plan::growing_tables(seed);
        if let Err(wrong) = crash_sweep(&plan, 10) {
            panic!("{wrong}\n{plan:?}");
        }
    });
}

#[test]
fn copies_on_read_lose_nothing_in_a_crash_anywhere() {
    for_each_seed("copies_on_read_lose_nothing", 12, |seed| {
        let mut plan = Plan::draw(seed);
        plan.copy_on_read = true;
        plan.rounds = 6;
        plan.workload.mix.push((Request::Read, 60));
        if let Err(wrong) = crash_sweep(&plan, 20) {
            panic!("{wrong}\n{plan:?}");
        }
    });
}

/// The canary of the crash sweep: a disk that ignores flushes must make it fail.
#[test]
fn a_disk_that_ignores_flushes_is_noticed() {
    let mut noticed = 0;
    for seed in 1..=6 {
        let mut plan = Plan::draw(seed);
        plan.disk.ignores_flush = true;
        noticed += u64::from(crash_sweep(&plan, 20).is_err());
    }
    assert!(noticed >= 5, "only {noticed} of 6 sweeps noticed");
}

/// A run in which the disk operation number `nth` of a kind fails.
fn fault_at(plan: &Plan, fault: Fault) -> u64 {
    let lasting = fault.lasting;
    let errno = fault.errno;
    let flushes = fault.operations.contains(&DiskOperation::Flush);
    simulate(plan.seed, |handle| async move {
        let power = Power::new();
        let Plan {
            geometry,
            disk,
            size,
            seed,
            ..
        } = plan;
        let mut chain = Chain::create(&handle, &power, geometry, *disk, *size, *seed).await;
        let options = WorkloadOptions {
            tolerated: vec![errno, Errno::EIO],
            ..plan.workload.clone()
        };
        let guest = chain.guest.clone();
        let model = Model::zeroed(*size);
        let workload = Workload::new(&handle, guest, model, options, *seed);
        workload.run(20).await;
        if seed % 3 == 0 {
            chain.snapshot().await.expect("no fault yet");
        }
        let disk = chain.disks[chain.disks.len() - 1].clone();
        disk.fail(fault);
        workload.run(100).await;
        if lasting {
            workload.flush().await;
        }
        disk.heal();
        let struck = disk.faults_struck();
        workload.verify().await;
        workload.run(60).await;
        workload.verify().await;
        // What failed once may fail a flush once; after that all is well. But a disk that failed to
        // flush may have dropped anything: then the image is not written any more.
        let flushed = workload.flush().await || workload.flush().await;
        assert!(flushed || flushes, "flushes fail for ever");
        chain.assert_sound(true, "after a fault").await;
        let left = chain.crash(&mut Random::new(*seed));
        let mut model = workload.model().clone();
        let reopened = Chain::open(&handle, &Power::new(), geometry, plan.disk, left, *seed).await;
        let reopened = reopened.expect("it can be opened again");
        let bytes = whole(&reopened).await.expect("it can be read");
        if let Err(mismatch) = model.check_after_crash(&bytes) {
            panic!("after a fault and a crash: {mismatch}");
        }
        struck
    })
}

const KINDS: [DiskOperation; 5] = [
    DiskOperation::Read,
    DiskOperation::Write,
    DiskOperation::Flush,
    DiskOperation::WriteZeroes,
    DiskOperation::Discard,
];

/// Fails operation 0, 1, 2, … of each kind until a run is clean.
fn fault_sweep(seed: u64, errno: Errno, lasting: bool) {
    let plan = Plan::draw(seed);
    let step = 2 + seed % 7;
    for kind in KINDS {
        let mut nth = 0;
        loop {
            let fault = match lasting {
                true => Fault::from(&[kind], nth, errno),
                false => Fault::once(&[kind], nth, errno),
            };
            let what = format!("{fault:?}");
            let told = Told(&what);
            let struck = fault_at(&plan, fault);
            drop(told);
            if struck == 0 || nth > 60 {
                break;
            }
            nth += step;
        }
    }
}

/// The image file cannot grow past a point: writes fail with `ENOSPC`, and all is well once there is
/// space again.
#[test]
fn a_full_disk_harms_nothing() {
    for_each_seed("a_full_disk_harms_nothing", 20, |seed| {
        let plan = Plan::draw(seed);
        simulate(seed, |handle| async move {
            let Plan {
                geometry,
                disk,
                size,
                ..
            } = &plan;
            let power = Power::new();
            let chain = Chain::create(&handle, &power, geometry, *disk, *size, seed).await;
            let options = WorkloadOptions {
                tolerated: vec![Errno::ENOSPC],
                ..plan.workload.clone()
            };
            let guest = chain.guest.clone();
            let workload = Workload::new(&handle, guest, Model::zeroed(*size), options, seed);
            workload.run(10).await;
            let full = chain.disks[0].size() + ((seed % 5) << geometry.cluster_bits) + 512;
            chain.disks[0].set_options(DiskOptions {
                capacity: full,
                ..*disk
            });
            workload.run(80).await;
            workload.verify().await;
            workload.flush().await;
            chain.disks[0].set_options(*disk);
            workload.run(40).await;
            workload.verify().await;
            assert!(workload.flush().await, "there is space again");
            chain.assert_sound(true, "after the disk was full").await;
        });
    });
}

/// Tells which fault it was when a run fails.
struct Told<'a>(&'a str);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("with {}", self.0);
        }
    }
}

#[test]
fn a_fault_anywhere_reaches_the_caller_and_harms_nothing() {
    for_each_seed("a_fault_anywhere", 4, |seed| {
        let errno = if seed % 2 == 0 {
            Errno::EIO
        } else {
            Errno::ENOSPC
        };
        fault_sweep(seed, errno, false);
    });
}

#[test]
fn a_failing_disk_harms_nothing_once_it_is_well_again() {
    for_each_seed("a_failing_disk", 4, |seed| {
        let errno = if seed % 2 == 0 {
            Errno::ENOSPC
        } else {
            Errno::EIO
        };
        fault_sweep(seed, errno, true);
    });
}

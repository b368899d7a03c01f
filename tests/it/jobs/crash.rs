//! Power fails at any moment of a job: the chain that the headers on disk describe, from the layer that is active
//! then, holds everything that was flushed.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use liveblk::job::{ErrorPolicy, Job, Status};
use liveblk::runtime::Runtime;
use liveblk::testing::{
    DiskOptions, Model, Power, Random, Workload, WorkloadOptions, for_each_seed, simulate,
};

use super::plan::{Chain, MIRRORS, Plan, options, start, whole, workload};
use super::stage::{Kind, Stage, Stored, World};
use crate::chain::check_disk;
use crate::crashes;

/// How a job is brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By itself; a commit of the active layer by `complete`.
    Whole,
    /// `cancel` without force when it is ready.
    Softly,
    /// `cancel` with force, somewhere.
    Hard,
}

/// A run that power may fail in.
#[derive(Clone, Debug)]
struct Run {
    seed: u64,
    chain: Chain,
    plan: Plan,
    end: End,
    disk: DiskOptions,
    /// The canary: flushes of what the job writes to do nothing while it runs.
    careless: bool,
}

/// The jobs of a sweep, on chains of 4 layers: A, B, C and the active one.
const JOBS: [(Plan, End); 18] = [
    (whole_chain(0), End::Whole),
    (stream(0, 2), End::Whole),
    (stream(1, 3), End::Whole),
    (whole_chain(1), End::Whole),
    (stream(0, 2), End::Hard),
    (commit(2, 3), End::Whole),
    (commit(1, 3), End::Whole),
    (commit(0, 3), End::Whole),
    (commit(1, 2), End::Whole),
    (commit(0, 2), End::Whole),
    (commit(0, 2), End::Softly),
    (commit(0, 3), End::Hard),
    (MIRRORS[0], End::Whole),
    (MIRRORS[1], End::Whole),
    (MIRRORS[2], End::Whole),
    (MIRRORS[3], End::Whole),
    (MIRRORS[0], End::Softly),
    (MIRRORS[2], End::Hard),
];

const fn whole_chain(device: usize) -> Plan {
    Plan::Stream { device, base: None }
}

const fn stream(device: usize, base: usize) -> Plan {
    Plan::Stream {
        device,
        base: Some(base),
    }
}

const fn commit(top: usize, base: usize) -> Plan {
    Plan::Commit { top, base }
}

impl Run {
    fn draw(seed: u64, (plan, end): (Plan, End)) -> Run {
        let mut random = Random::new(seed);
        let mut chain = Chain::draw(&mut random, 4);
        chain.requests = 10 + random.below(20);
        Run {
            seed,
            disk: DiskOptions {
                request_alignment: random.choose(&[1, 512]),
                native_fua: random.percent(50),
                write_zeroes: random.percent(70),
                garbles_discards: !chain.has_raw(),
                ..DiskOptions::default()
            },
            chain,
            plan,
            end,
            careless: false,
        }
    }

    fn world(&self, handle: &liveblk::runtime::Handle, power: &Power) -> World {
        World {
            handle: handle.clone(),
            power: power.clone(),
            disk: self.disk,
            seed: self.seed,
        }
    }
}

/// The job from its start to its end, with a guest before, beside and after it.
async fn doings(stage: Rc<Stage>, workload: Workload, run: Run, ended: Rc<Cell<bool>>) {
    let handle = stage.world.handle.clone();
    workload.run(15).await;
    let target = match run.plan.target() {
        Some(layer) => stage.disk(stage.layers()[layer].name()),
        None => {
            stage
                .prepare_target(run.plan.backing(&stage).as_ref())
                .await
                .disk
        }
    };
    target.set_options(DiskOptions {
        ignores_flush: run.careless,
        ..run.disk
    });
    let job = start(&stage, run.plan, options("j"), ErrorPolicy::Report).await;
    let job = job.expect("nothing is in the way");
    let beside = workload.clone();
    let guest = handle.spawn(async move { beside.run(60).await });
    lead(&stage, &job, &run).await;
    guest.await;
    assert!(
        run.end != End::Whole || job.error().is_none(),
        "{:?}",
        job.error()
    );
    target.set_options(run.disk);
    ended.set(true);
    workload.run(15).await;
    workload.flush().await;
}

async fn lead(stage: &Stage, job: &Rc<Job>, run: &Run) {
    let handle = &stage.world.handle;
    if run.end == End::Hard {
        handle
            .sleep(Duration::from_micros(run.seed * 397 % 5000))
            .await;
        let _ = job.cancel(true);
    } else if run.plan.follows() {
        while job.status() != Status::Ready {
            handle.sleep(Duration::from_micros(200)).await;
        }
        match run.end {
            End::Whole => job.complete(),
            _ => job.cancel(false),
        }
        .expect("it is ready");
    }
    job.until_over().await;
}

/// What a crash left: the images, the active layer and what the guest was promised.
struct Left {
    stored: Vec<Stored>,
    active: String,
    model: Model,
    operations: u64,
    /// Operations that changed a header, counted from the run's first.
    headers: Vec<u64>,
    ended: bool,
}

fn crash_at(run: &Run, operation: Option<u64>) -> Left {
    let runtime = Runtime::simulated(run.seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let world = run.world(&handle, &power);
    let (stage, workload) = runtime.block_on(async {
        let (stored, content) = run.chain.build(&world).await;
        let active = stored[stored.len() - 1].name.clone();
        let stage = Stage::open(&world, stored, &active).await;
        let stage = Rc::new(stage.expect("it was closed"));
        let workload = workload(&stage, &content, run.seed ^ 0xc4a5, 2);
        (stage, workload)
    });
    let before = power.operations();
    if let Some(operation) = operation {
        power.fail_after(operation);
    }
    let ended = Rc::new(Cell::new(false));
    let doings = doings(stage.clone(), workload.clone(), run.clone(), ended.clone());
    runtime.block_on(power.run(doings));
    let mut random = Random::new(run.seed ^ operation.unwrap_or(0) << 20);
    let changes = power.header_changes();
    let model = workload.model().clone();
    Left {
        stored: stage.crash(&mut random),
        active: stage.active().name().to_owned(),
        model,
        operations: power.operations() - before,
        headers: changes
            .iter()
            .filter_map(|at| at.checked_sub(before))
            .collect(),
        ended: ended.get(),
    }
}

/// Everything that must hold after the crash.
fn restart(run: &Run, left: Left) -> Result<(), String> {
    let disk = DiskOptions {
        ignores_flush: false,
        ..run.disk
    };
    simulate(run.seed, |handle| async move {
        let mut world = run.world(&handle, &Power::new());
        world.disk = disk;
        let Left {
            stored,
            active,
            mut model,
            ..
        } = left;
        for (index, image) in stored.iter().enumerate() {
            if matches!(image.kind, Kind::Raw) {
                continue;
            }
            let disk = world.disk_with(image.store.clone(), index as u64);
            let result = check_disk(&disk).await;
            let result = result.map_err(|error| format!("{}: {error}", image.name))?;
            if !result.is_safe() && !is_dirty(image) {
                return Err(format!("{}: {result:#?}", image.name));
            }
        }
        let stage = Stage::open(&world, stored, &active).await;
        let stage = stage.map_err(|error| format!("cannot be opened: {error}"))?;
        let mut bytes = whole(&stage).await.map_err(|error| error.to_string())?;
        bytes.truncate(model.size() as usize);
        let judged = model.check_after_crash(&bytes);
        judged.map_err(|mismatch| format!("{:?}: {mismatch}", stage.names()))?;
        let guest = stage.guest.clone();
        let options = WorkloadOptions::default();
        let workload = Workload::new(&handle, guest, model, options, run.seed);
        workload.run(20).await;
        workload.verify().await;
        stage.close().await.map_err(|error| error.to_string())
    })
}

/// Under the dirty mark refcounts may be too low until the next opening.
fn is_dirty(image: &Stored) -> bool {
    let mut header = [0; 80];
    image.store.read(0, &mut header);
    header[7] >= 3 && header[79] & 1 != 0
}

/// Crashes at so many operations spread over the run, and at all around changes of headers.
fn sweep(run: &Run, crashes: u64) -> Result<(), String> {
    let left = crash_at(run, None);
    assert!(left.ended, "the job does not end: {run:?}");
    let (operations, headers) = (left.operations, left.headers.clone());
    restart(run, left).map_err(|wrong| format!("crash at the end: {wrong}"))?;
    let spread = crashes::points(run.seed, operations, crashes);
    let near = headers.iter().flat_map(|at| at.saturating_sub(1)..=at + 2);
    let mut points: Vec<u64> = spread.chain(near).collect();
    points.retain(|at| (1..=operations).contains(at));
    points.sort_unstable();
    points.dedup();
    for operation in &points {
        let outcome = restart(run, crash_at(run, Some(*operation)));
        outcome.map_err(|wrong| format!("crash at {operation} of {operations}: {wrong}"))?;
    }
    Ok(())
}

#[test]
fn power_fails_anywhere_in_any_job() {
    for_each_seed("power_fails_anywhere_in_any_job", 1, |seed| {
        for (index, job) in JOBS.into_iter().enumerate() {
            let run = Run::draw(seed * 100 + index as u64, job);
            if let Err(wrong) = sweep(&run, 25) {
                panic!("{wrong}\n{run:?}");
            }
        }
    });
}

/// A job that changes the header (or the active layer) before its data is durable must make the sweep fail:
/// where one of these goes unnoticed the sweep is worth nothing.
#[test]
fn a_header_before_the_data_is_noticed() {
    let mut noticed = 0;
    let mut careless = 0;
    for (index, job) in JOBS.into_iter().enumerate() {
        if job.1 != End::Whole {
            continue;
        }
        careless += 1;
        let sweeps = (0..3).any(|seed| {
            let mut run = Run::draw(700 + 50 * seed + index as u64, job);
            run.careless = true;
            sweep(&run, 25).is_err()
        });
        noticed += u64::from(sweeps);
    }
    assert!(
        noticed + 1 >= careless,
        "only {noticed} of {careless} noticed"
    );
}

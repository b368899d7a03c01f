//! I/O that fails at any moment of a job: the guest's content is never wrong, the job ends with the error or goes on
//! as its policy says, the graph is in order, and a second try succeeds.

use std::rc::Rc;
use std::time::Duration;

use liveblk::job::{ErrorPolicy, Job, Status};
use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOperation, DiskOptions, Fault, Model, Power, Random, Workload, WorkloadOptions,
    for_each_seed, simulate,
};
use nix::errno::Errno;

use super::plan::{Chain, MIRRORS, Plan, options, start, whole};
use super::stage::{Stage, World};

const JOBS: [Plan; 9] = [
    Plan::Stream {
        device: 0,
        base: None,
    },
    Plan::Stream {
        device: 0,
        base: Some(2),
    },
    Plan::Stream {
        device: 1,
        base: Some(3),
    },
    Plan::Commit { top: 1, base: 2 },
    Plan::Commit { top: 1, base: 3 },
    Plan::Commit { top: 0, base: 2 },
    MIRRORS[0],
    MIRRORS[1],
    MIRRORS[2],
];

#[derive(Clone, Debug)]
struct Trial {
    seed: u64,
    plan: Plan,
    /// Which layer's disk fails; 0 is the active one, and the one after the last is a mirror's target.
    layer: usize,
    fault: Fault,
    policy: ErrorPolicy,
}

/// How a trial went.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The fault never struck.
    Clean,
    /// It struck, and the job succeeded all the same.
    Overcome,
    /// The job has failed.
    Failed,
}

async fn open(handle: &Handle, seed: u64) -> (Stage, Workload) {
    let mut random = Random::new(seed);
    let mut chain = Chain::draw(&mut random, 4);
    chain.requests = 20;
    let world = World {
        handle: handle.clone(),
        power: Power::new(),
        disk: DiskOptions {
            garbles_discards: !chain.has_raw(),
            ..DiskOptions::default()
        },
        seed,
    };
    let (stored, content) = chain.build(&world).await;
    let active = stored[stored.len() - 1].name.clone();
    let stage = Stage::open(&world, stored, &active).await;
    let stage = stage.expect("it was closed");
    let options = WorkloadOptions {
        depth: 2,
        longest: 16 << 10,
        tolerated: vec![Errno::EIO, Errno::ENOSPC],
        ..WorkloadOptions::default()
    };
    let model = Model::from_bytes(&content);
    let guest = stage.guest.clone();
    let workload = Workload::new(handle, guest, model, options, seed ^ 0xfa);
    (stage, workload)
}

/// Leads a job to its end; where it was stopped by an error it is resumed.
async fn lead(stage: &Stage, job: &Rc<Job>) -> u64 {
    let mut stops = 0;
    for _ in 0..20_000 {
        match job.status() {
            Status::Concluded | Status::Null => return stops,
            Status::Ready => drop(job.complete()),
            // A disk that failed a flush may fail for ever.
            Status::Paused | Status::Standby if stops > 50 => drop(job.cancel(true)),
            Status::Paused | Status::Standby => {
                stops += 1;
                job.resume().expect("it is paused");
            }
            _ => {}
        }
        stage.world.handle.sleep(Duration::from_micros(300)).await;
    }
    panic!("the job does not end: {:?}", job.status());
}

fn run(trial: &Trial) -> Outcome {
    simulate(trial.seed, |handle| async move {
        let (stage, workload) = open(&handle, trial.seed).await;
        let plan = trial.plan;
        let layers = stage.layers();
        let disk = match layers.get(trial.layer) {
            Some(layer) => stage.disk(layer.name()),
            None => {
                stage
                    .prepare_target(plan.backing(&stage).as_ref())
                    .await
                    .disk
            }
        };
        drop(layers);
        disk.fail(trial.fault.clone());
        let beside = workload.clone();
        let guest = handle.spawn(async move { beside.run(30).await });
        let failed = match start(&stage, plan, options("j"), trial.policy).await {
            Ok(job) => {
                lead(&stage, &job).await;
                job.error().is_some()
            }
            Err(_) => true,
        };
        guest.await;
        let struck = disk.faults_struck() > 0;
        disk.heal();
        workload.verify().await;
        assert!(struck || !failed, "it failed without a fault");
        if failed {
            stage.assert_in_order("after the fault");
            if stage.layers().len() == 4 {
                second_try(&stage, plan, trial).await;
            }
        }
        stage.assert_in_order("at the end");
        workload.verify().await;
        finish(&stage, &workload, trial).await;
        match (struck, failed) {
            (false, _) => Outcome::Clean,
            (true, false) => Outcome::Overcome,
            (true, true) => Outcome::Failed,
        }
    })
}

/// A disk that failed a flush may have lost anything: its image is not written any more.
fn may_stay_broken(trial: &Trial) -> bool {
    trial.fault.operations.contains(&DiskOperation::Flush)
}

async fn second_try(stage: &Stage, plan: Plan, trial: &Trial) {
    let again = start(stage, plan, options("again"), ErrorPolicy::Report).await;
    let again = match again {
        Ok(job) => {
            lead(stage, &job).await;
            job.error()
        }
        Err(error) => Some(error.message().to_owned()),
    };
    if !may_stay_broken(trial) {
        assert_eq!(again, None, "the second try");
    }
}

/// What is closed now can be opened again from its headers and holds what the guest has written.
async fn finish(stage: &Stage, workload: &Workload, trial: &Trial) {
    let flushed = workload.flush().await || workload.flush().await;
    assert!(flushed || may_stay_broken(trial), "flushes fail for ever");
    stage.assert_sound(true, "at the end").await;
    let active = stage.active().name().to_owned();
    let left = stage.crash(&mut Random::new(trial.seed));
    let again = Stage::open(&stage.world, left, &active).await;
    let again = again.expect("it can be opened from its headers");
    let mut bytes = whole(&again).await.expect("it can be read");
    let mut model = workload.model().clone();
    bytes.truncate(model.size() as usize);
    if let Err(mismatch) = model.check_after_crash(&bytes) {
        panic!("{:?}: {mismatch}", again.names());
    }
}

const KINDS: [DiskOperation; 4] = [
    DiskOperation::Read,
    DiskOperation::Write,
    DiskOperation::WriteZeroes,
    DiskOperation::Flush,
];

/// Fails operations of each kind on each layer's disk, ever later, until a run is clean.
fn sweep(seed: u64, plan: Plan, policy: ErrorPolicy, errno: Errno, step: u64) -> (u64, u64) {
    let (mut failed, mut overcome) = (0, 0);
    let disks = match plan {
        Plan::Mirror { .. } => 5,
        _ => 4,
    };
    for layer in 0..disks {
        for kind in KINDS {
            let mut nth = seed % 3;
            loop {
                let trial = Trial {
                    seed,
                    plan,
                    layer,
                    fault: Fault::once(&[kind], nth, errno),
                    policy,
                };
                let told = Told(&trial);
                let outcome = run(&trial);
                drop(told);
                match outcome {
                    Outcome::Clean => break,
                    Outcome::Failed => failed += 1,
                    Outcome::Overcome => overcome += 1,
                }
                nth += step;
                if nth > 60 {
                    break;
                }
            }
        }
    }
    (failed, overcome)
}

struct Told<'a>(&'a Trial);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?}", self.0);
        }
    }
}

#[test]
fn a_fault_anywhere_in_a_job_harms_nothing() {
    let (mut failed, mut overcome) = (0, 0);
    for_each_seed("a_fault_anywhere_in_a_job", 1, |seed| {
        for (index, plan) in JOBS.into_iter().enumerate() {
            let errno = [Errno::EIO, Errno::ENOSPC][(seed as usize + index) % 2];
            let (more, less) = sweep(
                seed * 10 + index as u64,
                plan,
                ErrorPolicy::Report,
                errno,
                5,
            );
            failed += more;
            overcome += less;
        }
    });

    assert!(failed > 0, "no fault ever ended a job");
}

/// A job that is stopped by an error is resumed and comes to its end; what it does in its first and last steps is
/// under no policy.
#[test]
fn a_job_that_stops_at_errors_goes_on() {
    let (mut failed, mut overcome) = (0, 0);
    for_each_seed("a_job_that_stops_at_errors", 1, |seed| {
        for (index, plan) in JOBS.into_iter().enumerate() {
            let seed = seed * 10 + 500 + index as u64;
            let (more, less) = sweep(seed, plan, ErrorPolicy::Stop, Errno::EIO, 7);
            failed += more;
            overcome += less;
        }
    });

    assert!(overcome > failed, "{overcome} went on, {failed} failed");
}

//! Random chains, random jobs (several at a time), random requests between and during them: the device and
//! the images hold against the model after each step.

use std::rc::Rc;
use std::time::Duration;

use liveblk::error::ErrorKind;
use liveblk::job::{ErrorPolicy, Job, JobEvent, Status};
use liveblk::runtime::Handle;
use liveblk::testing::{DiskOptions, Power, Random, Workload, for_each_seed, simulate};

use super::plan::{Chain, Plan, options, start, whole, workload};
use super::stage::{Stage, World};
use crate::chain::Geometry;

struct Trial {
    handle: Handle,
    random: Random,
    stage: Stage,
    workload: Workload,
    jobs: u64,
    started: u64,
    told: Vec<String>,
}

impl Trial {
    async fn new(handle: &Handle, seed: u64) -> Trial {
        let mut random = Random::new(seed);
        let layers = 2 + random.below(7);
        let chain = Chain::draw(&mut random, layers);
        let world = World {
            handle: handle.clone(),
            power: Power::new(),
            disk: DiskOptions {
                request_alignment: random.choose(&[1, 512]),
                native_fua: random.percent(50),
                write_zeroes: random.percent(70),
                garbles_discards: !chain.has_raw(),
                stragglers: random.choose(&[0, 0, 2]),
                ..DiskOptions::default()
            },
            seed,
        };
        let (stored, content) = chain.build(&world).await;
        let active = stored[stored.len() - 1].name.clone();
        let stage = Stage::open(&world, stored, &active)
            .await
            .expect("it was closed");
        let depth = random.choose(&[1, 2, 4, 8]);
        Trial {
            handle: handle.clone(),
            workload: workload(&stage, &content, seed ^ 0xf00, depth),
            stage,
            random,
            jobs: 0,
            started: 0,
            told: vec![format!("{chain:?}")],
        }
    }

    fn tell(&mut self, line: String) {
        self.told.push(line);
    }

    async fn try_start(&mut self) {
        let layers = self.stage.layers().len();
        if layers < 2 {
            return;
        }
        let plan = Plan::draw(&mut self.random, layers);
        let mut job = options(&format!("job{}", self.jobs));
        self.jobs += 1;
        job.auto_finalize = self.random.percent(70);
        job.auto_dismiss = self.random.percent(70);
        job.speed = match self.random.percent(20) {
            true => 1 << (16 + self.random.below(8)),
            false => 0,
        };
        let names = self.stage.names();
        let what = format!("{plan:?} on {names:?} as {job:?}");
        match start(&self.stage, plan, job, ErrorPolicy::Report).await {
            Ok(_) => {
                self.started += 1;
                self.tell(what);
            }
            Err(error) => {
                let refused = error.kind() == ErrorKind::InUse;
                self.tell(format!("{what}: {error}"));
                assert!(refused, "{what}: {error}");
            }
        }
    }

    /// Does something to some job, or to the chain.
    async fn meddle(&mut self) {
        let micros = self.random.below(3000);
        self.handle.sleep(Duration::from_micros(micros)).await;
        let jobs = self.stage.workshop.jobs.list();
        if jobs.is_empty() || self.random.percent(10) {
            self.snapshot().await;
            return;
        }
        let index = self.random.below(jobs.len() as u64) as usize;
        let job = &jobs[index];
        let drawn = self.random.below(12);
        let speed = (1_i64 << 15) << self.random.below(10);
        self.tell(format!("{drawn} to {} ({:?})", job.id(), job.status()));
        // What the state does not allow is refused, and that is all.
        let _ = match drawn {
            0..3 => job.pause(),
            3..6 => job.resume(),
            6 => job.set_speed(speed),
            7 => job.set_speed(0),
            8 => job.complete(),
            9 => job.finalize(),
            10 if self.random.percent(30) => job.cancel(true),
            11 if self.random.percent(50) => job.cancel(false),
            _ => {
                self.try_start().await;
                Ok(())
            }
        };
    }

    async fn snapshot(&mut self) {
        if self.stage.images.borrow().len() < 14 && self.random.percent(40) {
            let geometry = Geometry::draw(&mut self.random);
            let made = self.stage.snapshot(&geometry).await;
            self.tell(format!("snapshot: {:?}", made.is_ok()));
        }
    }

    /// Brings every job to an end.
    async fn end_jobs(&mut self) {
        for _ in 0..100_000 {
            let jobs = self.stage.workshop.jobs.list();
            if jobs.is_empty() {
                return;
            }
            for job in jobs {
                self.nudge(&job);
            }
            self.handle.sleep(Duration::from_micros(500)).await;
        }
        let jobs = self.stage.workshop.jobs.list();
        let state = |job: &Rc<Job>| {
            (
                job.id().to_owned(),
                job.status(),
                job.is_paused(),
                job.progress(),
                job.speed(),
            )
        };
        let left: Vec<_> = jobs.iter().map(state).collect();
        panic!("jobs do not end: {left:?}");
    }

    fn nudge(&mut self, job: &Rc<Job>) {
        let done = match job.status() {
            Status::Paused | Status::Standby => job.resume(),
            Status::Running if job.speed() > 0 => job.set_speed(0),
            Status::Running if job.is_paused() => job.resume(),
            Status::Ready if self.random.percent(70) => job.complete(),
            Status::Ready => job.cancel(false),
            Status::Pending if !job.options().auto_finalize => job.finalize(),
            Status::Concluded => self.stage.workshop.jobs.dismiss(job),
            _ => Ok(()),
        };
        drop(done);
    }

    fn assert_nothing_failed(&self) {
        for event in &*self.stage.events.borrow() {
            match event {
                JobEvent::Completed(report, Some(error)) => {
                    panic!("{report:?}: {error}");
                }
                JobEvent::Error { .. } => panic!("{event:?}"),
                _ => {}
            }
        }
    }

    async fn round(&mut self) {
        let requests = self.random.below(150);
        let guest = self.workload.clone();
        let guest = self.handle.spawn(async move { guest.run(requests).await });
        for _ in 0..1 + self.random.below(3) {
            self.try_start().await;
        }
        for _ in 0..self.random.below(14) {
            self.meddle().await;
        }
        if self.random.percent(50) {
            // The guest goes on to the jobs' ends.
            let more = self.workload.clone();
            self.end_jobs().await;
            guest.await;
            more.run(5).await;
        } else {
            guest.await;
            self.end_jobs().await;
        }
        self.assert_nothing_failed();
        self.workload.verify().await;
        self.stage.assert_at_rest("after the jobs");
        if self.random.percent(30) {
            self.workload.flush().await;
            self.stage.assert_sound(true, "after a flush").await;
        }
    }

    async fn run(&mut self) {
        for _ in 0..2 + self.random.below(4) {
            self.snapshot().await;
            self.round().await;
        }
        let active = self.stage.active().name().to_owned();
        let size = self.workload.model().size() as usize;
        self.stage.close().await.expect("no fault");
        self.stage.assert_sound(false, "after closing").await;
        let world = self.stage.world.clone();
        let again = Stage::open(&world, self.stage.stored(), &active).await;
        let again = again.expect("what was closed can be opened");
        let bytes = whole(&again).await.expect("no fault");
        let checked = self.workload.model().check_read(0, &bytes[..size]);
        checked.expect("the images hold what the guest wrote");
        again.close().await.expect("no fault");
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.told.join("\n"));
        }
    }
}

#[test]
fn random_jobs_hold_against_the_model() {
    let mut started = 0;
    for_each_seed("random_jobs_hold_against_the_model", 40, |seed| {
        started += simulate(seed, |handle| async move {
            let mut trial = Trial::new(&handle, seed).await;
            trial.run().await;
            trial.started
        });
    });
    assert!(started > 0, "no job was ever started");
}

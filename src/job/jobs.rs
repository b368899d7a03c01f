//! All jobs of a graph, and the runner that leads each through its life.

use std::cell::RefCell;
use std::rc::Rc;

use super::control::Job;
use super::{JobEvent, JobKind, JobOptions, Status, Verb, Work};
use nix::errno::Errno;

use crate::block::is_well_formed;
use crate::error::{Error, ErrorKind, Result, strerror};
use crate::runtime::Handle;
use crate::runtime::sync::Mutex;

/// The jobs that were not dismissed. Cheap to clone: a handle.
#[derive(Clone)]
pub struct Jobs {
    inner: Rc<Inner>,
}

struct Inner {
    handle: Handle,
    changes: Rc<Mutex<()>>,
    jobs: RefCell<Vec<Rc<Job>>>,
    sinks: RefCell<Vec<Sink>>,
}

type Sink = Rc<dyn Fn(&JobEvent)>;

impl Jobs {
    /// No jobs. `changes` is held by whoever changes the graph over an await; jobs do so at their end.
    pub fn new(handle: &Handle, changes: &Rc<Mutex<()>>) -> Jobs {
        Jobs {
            inner: Rc::new(Inner {
                handle: handle.clone(),
                changes: changes.clone(),
                jobs: RefCell::default(),
                sinks: RefCell::default(),
            }),
        }
    }

    /// Calls `sink` for whatever happens to a job from now on.
    pub fn on_event(&self, sink: impl Fn(&JobEvent) + 'static) {
        self.inner.sinks.borrow_mut().push(Rc::new(sink));
    }

    /// The runtime that jobs run on.
    pub fn handle(&self) -> &Handle {
        &self.inner.handle
    }

    /// All jobs, newest first.
    pub fn list(&self) -> Vec<Rc<Job>> {
        self.inner.jobs.borrow().iter().rev().cloned().collect()
    }

    /// The job of this name.
    pub fn find(&self, id: &str) -> Option<Rc<Job>> {
        self.list().into_iter().find(|job| job.id() == id)
    }

    /// A new job that does nothing yet; `start` or `give_up` must follow.
    ///
    /// # Errors
    /// The id is malformed or taken: nothing was told. The speed is negative: the job has come and gone.
    pub fn create(&self, kind: JobKind, options: JobOptions) -> Result<Rc<Job>> {
        let id = options.id.clone();
        if !is_well_formed(&id) {
            return Err(Error::refused(format!("Invalid job ID '{id}'")));
        }
        if self.find(&id).is_some() {
            return Err(Error::refused(format!("Job ID '{id}' already in use")));
        }
        let speed = options.speed;
        let inner = Rc::downgrade(&self.inner);
        let tell = Rc::new(move |event| {
            let Some(inner) = inner.upgrade() else { return };
            let sinks = inner.sinks.borrow().clone();
            for sink in sinks {
                sink(&event);
            }
        });
        let job = Rc::new(Job::new(options, kind, &self.inner.handle, tell));
        self.inner.jobs.borrow_mut().push(job.clone());
        job.enter(Status::Created);
        if let Err(error) = job.limit_speed(speed) {
            self.give_up(&job);
            return Err(error);
        }
        Ok(job)
    }

    /// A created job could not be set up: it goes.
    pub fn give_up(&self, job: &Rc<Job>) {
        self.forget(job);
    }

    /// A created job is not to run, as the transaction that it is part of has failed.
    pub fn abort(&self, job: &Rc<Job>) {
        job.set_error(strerror(Errno::ECANCELED));
        job.enter(Status::Aborting);
        job.enter(Status::Concluded);
        if job.options().auto_dismiss {
            self.forget(job);
        }
    }

    /// Lets a created job run.
    pub fn start(&self, job: &Rc<Job>, work: Rc<dyn Work>) {
        job.note(&work);
        job.enter(Status::Running);
        let (jobs, job) = (self.clone(), job.clone());
        let life = async move {
            run(&job, work, &jobs.inner.changes).await;
            if job.options().auto_dismiss {
                jobs.forget(&job);
            }
        };
        self.inner.handle.spawn(life).detach();
    }

    /// `cancel`: see [`Job::cancel`]. A block job that ends at once has ended when this returns; one that
    /// can end well does so by itself.
    ///
    /// # Errors
    /// As [`Job::cancel`].
    pub async fn cancel(&self, job: &Rc<Job>, force: bool) -> Result<()> {
        job.cancel(force)?;
        if job.kind().is_block_job() && !job.ends_well() {
            job.until_over().await;
        }
        Ok(())
    }

    /// `dismiss`: forgets a job that has ended.
    ///
    /// # Errors
    /// It has not.
    pub fn dismiss(&self, job: &Rc<Job>) -> Result<()> {
        Verb::Dismiss.check(job.id(), job.status())?;
        self.forget(job);
        Ok(())
    }

    /// The end of the program: cancels what runs, waits for it, forgets all.
    pub async fn end_all(&self) {
        for job in self.list() {
            if job.status() == Status::Concluded {
                self.forget(&job);
            }
        }
        for job in self.list() {
            // Refused by a job that is about to end by itself.
            let _ = job.cancel(true);
            job.until_over().await;
            if job.status() == Status::Concluded {
                self.forget(&job);
            }
        }
    }

    fn forget(&self, job: &Rc<Job>) {
        let mut jobs = self.inner.jobs.borrow_mut();
        let before = jobs.len();
        jobs.retain(|other| !Rc::ptr_eq(other, job));
        let was_there = jobs.len() < before;
        drop(jobs);
        if was_there {
            job.enter(Status::Null);
        }
    }
}

/// The life of a job from `running` to `concluded`.
async fn run(job: &Rc<Job>, work: Rc<dyn Work>, changes: &Mutex<()>) {
    let mut result = work.clone().run(job.clone()).await;
    job.leave_pause(result.is_err() || job.is_cancelled()).await;
    if result.is_ok() && !job.is_cancelled() {
        job.enter(Status::Waiting);
        if job.until_pending().await && job.until_finalized().await {
            let _turn = changes.lock().await;
            if !job.is_cancelled() {
                job.deciding.set(true);
                result = work.prepare().await;
            }
        }
    }
    let failure = match result {
        _ if job.is_cancelled() => Some(strerror(Errno::ECANCELED)),
        Ok(()) => None,
        Err(error) => Some(told(&error)),
    };
    let succeeded = failure.is_none();
    if let Some(failure) = failure {
        job.set_error(failure);
        job.enter(Status::Aborting);
        job.fail_group().await;
    }
    let turn = changes.lock().await;
    work.clean(succeeded).await;
    job.remember(&*work);
    drop(turn);
    let report = job.report();
    job.tell(if job.is_cancelled() {
        JobEvent::Cancelled(report)
    } else {
        JobEvent::Completed(report, job.error())
    });
    job.enter(Status::Concluded);
}

/// What clients are told of an error: of failed I/O only the errno's text.
fn told(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Io(errno) => strerror(errno),
        ErrorKind::NoSpace => strerror(Errno::ENOSPC),
        _ => error.message().to_owned(),
    }
}

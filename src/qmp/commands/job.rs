//! Jobs that make images: their states and events. (Jobs on running graphs are the layer `job`.)

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::blockdev::is_well_formed;
use crate::qmp::error::QmpError;

/// All jobs that were not dismissed, oldest first.
#[derive(Default)]
pub(super) struct Jobs {
    jobs: RefCell<Vec<Rc<Job>>>,
}

/// A job of type `create`: it runs, then waits to be dismissed.
pub(super) struct Job {
    id: String,
    status: Cell<Status>,
    error: RefCell<Option<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    Created,
    Running,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }
}

impl Jobs {
    /// A new job, which runs.
    ///
    /// # Errors
    /// The id is malformed or taken.
    pub(super) fn start(&self, context: &Context, id: &str) -> Result<Rc<Job>, QmpError> {
        if !is_well_formed(id) {
            return Err(QmpError::generic(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_some() {
            let text = format!("Job ID '{id}' already in use");
            return Err(QmpError::generic(text));
        }
        let job = Rc::new(Job {
            id: id.into(),
            status: Cell::new(Status::Created),
            error: RefCell::default(),
        });
        self.jobs.borrow_mut().push(job.clone());
        job.enter(context, Status::Created);
        job.enter(context, Status::Running);
        Ok(job)
    }

    /// `job-dismiss`.
    pub(super) fn dismiss(&self, context: &Context, id: &str) -> Outcome {
        let Some(job) = self.find(id) else {
            return Err(QmpError::generic("Job not found"));
        };
        if job.status.get() != Status::Concluded {
            let state = job.status.get().name();
            let text =
                format!("Job '{id}' in state '{state}' cannot accept command verb 'dismiss'");
            return Err(QmpError::generic(text));
        }
        self.forget(context, &job);
        Ok(json!({}))
    }

    /// `query-jobs`: newest first.
    pub(super) fn query(&self) -> Outcome {
        Ok(self
            .jobs
            .borrow()
            .iter()
            .rev()
            .map(|job| job.info())
            .collect())
    }

    /// The end of the program: nobody can dismiss what has concluded any more.
    pub(super) fn forget_all(&self, context: &Context) {
        let jobs = self.jobs.borrow().clone();
        for job in jobs
            .iter()
            .filter(|job| job.status.get() == Status::Concluded)
        {
            self.forget(context, job);
        }
    }

    fn forget(&self, context: &Context, job: &Rc<Job>) {
        self.jobs
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, job));
        job.enter(context, Status::Null);
    }

    fn find(&self, id: &str) -> Option<Rc<Job>> {
        self.jobs.borrow().iter().find(|job| job.id == id).cloned()
    }
}

impl Job {
    /// The work is done, or has failed.
    pub(super) fn conclude(&self, context: &Context, result: Result<(), QmpError>) {
        match result {
            Ok(()) => {
                self.enter(context, Status::Waiting);
                self.enter(context, Status::Pending);
            }
            Err(error) => {
                *self.error.borrow_mut() = Some(error.desc);
                self.enter(context, Status::Aborting);
            }
        }
        self.enter(context, Status::Concluded);
    }

    fn enter(&self, context: &Context, status: Status) {
        self.status.set(status);
        let data = json!({"id": self.id, "status": status.name()});
        context.events.emit("JOB_STATUS_CHANGE", data);
    }

    fn info(&self) -> Value {
        let error = self.error.borrow();
        let done = self.status.get() == Status::Concluded;
        let mut info = json!({
            "id": self.id,
            "type": "create",
            "status": self.status.get().name(),
            "current-progress": u8::from(done),
            "total-progress": 1,
        });
        if let Some(error) = &*error {
            info["error"] = error.as_str().into();
        }
        info
    }
}

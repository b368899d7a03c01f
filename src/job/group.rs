//! Jobs that end together: all of them well, or none.
//!
//! Each does its work by itself and then waits for the others; the last one lets all go on, the newest
//! first. One that fails or is cancelled takes the others with it, at any time before. What they do after
//! that ([`Work::prepare`](super::Work::prepare)) must not fail: only backups, which do nothing there, are
//! grouped.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use super::control::Job;
use super::{JobEvent, Status};

/// Jobs that end together.
#[derive(Default)]
pub struct JobGroup {
    /// Oldest first.
    members: RefCell<Vec<Weak<Job>>>,
}

impl JobGroup {
    /// This job, which does not run yet, is one of them.
    pub(super) fn add(self: &Rc<Self>, job: &Rc<Job>) {
        self.members.borrow_mut().push(Rc::downgrade(job));
        job.set_group(self);
    }

    /// Newest first.
    fn members(&self) -> Vec<Rc<Job>> {
        let members = self.members.borrow();
        members.iter().rev().filter_map(Weak::upgrade).collect()
    }
}

impl Job {
    /// The jobs that end with this one, and this one; newest first.
    fn companions(self: &Rc<Self>) -> Vec<Rc<Job>> {
        match self.group() {
            Some(group) => group.members(),
            None => vec![self.clone()],
        }
    }

    /// Waits until all that end together have done their work; false if it was cancelled instead.
    pub(super) async fn until_pending(self: &Rc<Self>) -> bool {
        let all = self.companions();
        if all.iter().all(|job| job.status() == Status::Waiting) && !self.is_cancelled() {
            all.iter().for_each(|job| job.become_pending());
        }
        self.until(|| self.status() == Status::Pending || self.is_cancelled())
            .await;
        !self.is_cancelled()
    }

    fn become_pending(self: &Rc<Self>) {
        self.enter(Status::Pending);
        if !self.options().auto_finalize {
            let id = self.id().to_owned();
            let kind = self.kind();
            self.tell(JobEvent::Pending { id, kind });
        }
    }

    /// Waits for `finalize`, of any that end together; goes on at once where none of them needs it. Newer
    /// ones end first. False if it was cancelled instead.
    pub(super) async fn until_finalized(self: &Rc<Self>) -> bool {
        let all = self.companions();
        let by_themselves = all.iter().all(|job| job.options().auto_finalize);
        let is_told = || by_themselves || all.iter().any(|job| job.finalizing.get());
        // One that is cancelled will cancel the others.
        let is_whole = || !all.iter().any(|job| job.is_cancelled());
        self.until(|| (is_told() && is_whole()) || self.is_cancelled())
            .await;
        if !self.is_cancelled() && all.len() > 1 {
            // From now on none of them can be cancelled.
            all.iter().for_each(|job| job.deciding.set(true));
            self.until_newer_are_over(&all).await;
        }
        !self.is_cancelled()
    }

    /// This job has failed: so do those that would end with it. Newer ones end first.
    pub(super) async fn fail_group(self: &Rc<Self>) {
        if self.deciding.get() {
            return;
        }
        let all = self.companions();
        let others = all.iter().filter(|job| !Rc::ptr_eq(job, self));
        let others: Vec<&Rc<Job>> = others.collect();
        for job in &others {
            // Refused by one that has ended, which has failed, too.
            let _ = job.cancel(true);
        }
        let is_told = |job: &Job| job.status() == Status::Aborting || job.status().is_over();
        self.until(|| others.iter().all(|job| is_told(job))).await;
        self.until_newer_are_over(&all).await;
    }

    async fn until_newer_are_over(self: &Rc<Self>, all: &[Rc<Job>]) {
        let newer = all.iter().take_while(|job| !Rc::ptr_eq(job, self));
        let newer: Vec<&Rc<Job>> = newer.collect();
        self.until(|| newer.iter().all(|job| job.status().is_over()))
            .await;
    }

    /// Something about this job has changed, for which those that end with it may wait.
    pub(super) fn wake_group(&self) {
        let Some(group) = self.group() else { return };
        for job in group.members() {
            job.look_again();
        }
    }
}

//! A job: its state, what its users ask of it, and what its work asks of it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

use super::rate_limit::RateLimit;
use super::{
    BlockJobReport, ErrorAction, ErrorPolicy, IoStatus, JobEvent, JobGroup, JobKind, Operation,
    Progress, Status,
};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::CopyMode;
use crate::runtime::Handle;
use crate::runtime::sync::Notify;

/// A future on the graph's thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What every job is started with.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Its name.
    pub id: String,
    /// Bytes a second; 0 is no limit. Negative is refused.
    pub speed: i64,
    /// It takes its last steps by itself.
    pub auto_finalize: bool,
    /// It is forgotten when it has ended.
    pub auto_dismiss: bool,
}

/// What a kind of job does. A job's runner calls [`Work::run`], then (when it is finalized)
/// [`Work::prepare`], and [`Work::clean`] at the end in any case.
pub trait Work {
    /// The long part. Ends early, with any result, when the job is cancelled.
    fn run(self: Rc<Self>, job: Rc<Job>) -> LocalFuture<'static, Result<()>>;

    /// The last step that may fail: what makes the result count, on disk and in the graph.
    fn prepare(&self) -> LocalFuture<'_, Result<()>>;

    /// Gives back all that the job has taken. `succeeded`: the job's result counts.
    fn clean(&self, succeeded: bool) -> LocalFuture<'_, ()>;

    /// From now on the guest's writes are dealt with like this.
    ///
    /// # Errors
    /// The job does not follow the guest, or cannot go back; in QEMU's words.
    fn change_copy_mode(&self, _mode: CopyMode) -> Result<()> {
        let message = "Job type does not support change";
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Of a mirror: all is copied, and what is written goes to both.
    fn is_in_step(&self) -> Option<bool> {
        None
    }

    /// There is nothing to do: whoever starts the job may wait for its end.
    fn ends_at_once(&self) -> bool {
        false
    }

    /// A cancel without force, once the job is ready, lets it end well.
    fn ends_well_when_cancelled_ready(&self) -> bool {
        false
    }
}

/// How a job was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cancelled {
    No,
    /// In the ready state: it ends well, without the last step.
    Softly,
    Hard,
}

/// A job's state, shared by its runner, its work and its users.
pub struct Job {
    options: JobOptions,
    kind: JobKind,
    handle: Handle,
    tell: Rc<dyn Fn(JobEvent)>,
    status: Cell<Status>,
    progress: Cell<Progress>,
    pub(super) limit: RateLimit,
    pub(super) io_status: Cell<IoStatus>,
    /// Stopped by its user or by an error.
    pub(super) paused: Cell<bool>,
    /// Pieces of work in flight; a pause holds when there are none.
    pub(super) pieces: Cell<u32>,
    pub(super) ends_well: Cell<bool>,
    ends_at_once: Cell<bool>,
    work: RefCell<Option<Weak<dyn Work>>>,
    /// What the work said last of [`Work::is_in_step`].
    in_step: Cell<Option<bool>>,
    pub(super) cancelled: Cell<Cancelled>,
    pub(super) completing: Cell<bool>,
    pub(super) finalizing: Cell<bool>,
    /// The last step is being taken: how that ends is how the job ends.
    pub(super) deciding: Cell<bool>,
    error: RefCell<Option<String>>,
    /// Those that end with it.
    group: RefCell<Option<Rc<JobGroup>>>,
    pub(super) changed: Notify,
}

impl Job {
    pub(super) fn new(
        options: JobOptions,
        kind: JobKind,
        handle: &Handle,
        tell: Rc<dyn Fn(JobEvent)>,
    ) -> Job {
        Job {
            options,
            kind,
            handle: handle.clone(),
            tell,
            status: Cell::new(Status::Undefined),
            progress: Cell::default(),
            limit: RateLimit::default(),
            io_status: Cell::default(),
            paused: Cell::new(false),
            pieces: Cell::new(0),
            ends_well: Cell::new(false),
            ends_at_once: Cell::new(false),
            work: RefCell::default(),
            in_step: Cell::default(),
            cancelled: Cell::new(Cancelled::No),
            completing: Cell::new(false),
            finalizing: Cell::new(false),
            deciding: Cell::new(false),
            error: RefCell::default(),
            group: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// What it was started with.
    pub fn options(&self) -> &JobOptions {
        &self.options
    }

    /// What it does.
    pub fn kind(&self) -> JobKind {
        self.kind
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.status.get()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.progress.get()
    }

    /// Bytes a second at most; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.limit.speed()
    }

    /// Whether its I/O works.
    pub fn io_status(&self) -> IoStatus {
        self.io_status.get()
    }

    /// Stopped by its user or by an error.
    pub fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// Why it has failed, if it has.
    pub fn error(&self) -> Option<String> {
        self.error.borrow().clone()
    }

    /// A cancel without force lets it end well once it is ready.
    pub fn ends_well(&self) -> bool {
        self.ends_well.get()
    }

    /// There is nothing to do for it.
    pub fn ends_at_once(&self) -> bool {
        self.ends_at_once.get()
    }

    /// What is known of the job from its work.
    pub(super) fn note(&self, work: &Rc<dyn Work>) {
        *self.work.borrow_mut() = Some(Rc::downgrade(work));
        self.ends_well.set(work.ends_well_when_cancelled_ready());
        self.ends_at_once
            .set(work.ends_at_once() && self.options.auto_finalize);
    }

    /// Of a mirror: all is copied, and what is written goes to both.
    pub fn is_in_step(&self) -> Option<bool> {
        match self.work() {
            Some(work) => work.is_in_step(),
            None => self.in_step.get(),
        }
    }

    /// The work ends.
    pub(super) fn remember(&self, work: &dyn Work) {
        self.in_step.set(work.is_in_step());
    }

    /// The work, while there is some.
    pub(super) fn work(&self) -> Option<Rc<dyn Work>> {
        self.work.borrow().as_ref()?.upgrade()
    }

    /// Waits until it is over.
    pub async fn until_over(&self) {
        self.until(|| self.status().is_over()).await;
    }

    /// Goes to another state and tells so.
    pub(super) fn enter(&self, status: Status) {
        let before = self.status.replace(status);
        assert!(
            before.may_become(status),
            "job '{}' goes from {before:?} to {status:?}",
            self.id()
        );
        let id = self.id().to_owned();
        (self.tell)(JobEvent::StatusChange { id, status });
        self.changed.notify_all();
        self.wake_group();
    }

    pub(super) fn set_group(&self, group: &Rc<JobGroup>) {
        *self.group.borrow_mut() = Some(group.clone());
    }

    pub(super) fn group(&self) -> Option<Rc<JobGroup>> {
        self.group.borrow().clone()
    }

    pub(super) fn tell(&self, event: JobEvent) {
        if self.kind.is_block_job() {
            (self.tell)(event);
        }
    }

    pub(super) fn report(&self) -> BlockJobReport {
        BlockJobReport {
            id: self.id().to_owned(),
            kind: self.kind,
            progress: self.progress(),
            speed: self.speed(),
        }
    }

    pub(super) fn set_error(&self, message: impl Into<String>) {
        *self.error.borrow_mut() = Some(message.into());
    }

    /// Waits for something that [`Job`]'s own state decides.
    pub(super) async fn until(&self, holds: impl Fn() -> bool) {
        while !holds() {
            self.changed.notified().await;
        }
    }
}

/// What the work asks.
impl Job {
    /// Timers and the clock.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The job is to end at once, its result does not count.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.get() == Cancelled::Hard
    }

    /// The job is to end well, without its last step.
    pub fn is_cancelled_softly(&self) -> bool {
        self.cancelled.get() == Cancelled::Softly
    }

    /// The job was told to complete.
    pub fn is_completing(&self) -> bool {
        self.completing.get()
    }

    /// Waits until a piece of work may begin: not paused, within the speed limit. `None`: cancelled.
    pub async fn admit(self: &Rc<Self>) -> Option<Piece> {
        loop {
            if self.is_cancelled() {
                return None;
            }
            if self.paused.get() {
                self.changed.notified().await;
                continue;
            }
            let Some(delay) = self.limit.delay(self.handle.now()) else {
                break;
            };
            self.rest(delay).await;
        }
        self.pieces.set(self.pieces.get() + 1);
        Some(Piece { job: self.clone() })
    }

    /// Lets this time pass, or less where something about the job changes: whoever rests looks again afterwards.
    pub(super) async fn rest(&self, delay: Duration) {
        let _ = self.handle.timeout(delay, self.changed.notified()).await;
    }

    /// Waits while the job is paused. A pause that came while the last piece was in flight would be missed
    /// else: nobody is admitted any more.
    pub async fn until_unpaused(&self) {
        self.until(|| !self.paused.get() || self.is_cancelled())
            .await;
    }

    /// Waits until the job is told something (completed, cancelled, resumed) or `holds`.
    pub async fn until_told(&self, holds: impl Fn() -> bool) {
        let told = || self.completing.get() || self.cancelled.get() != Cancelled::No;
        self.until(|| holds() || (told() && !self.paused.get()) || self.is_cancelled())
            .await;
    }

    /// Lets [`Job::until_told`] look again.
    pub fn look_again(&self) {
        self.changed.notify_all();
    }

    /// This much work is known of.
    pub fn set_total(&self, total: u64) {
        let mut progress = self.progress.get();
        progress.total = total;
        self.progress.set(progress);
    }

    /// More work has come up.
    pub fn add_total(&self, more: u64) {
        self.set_total(self.progress().total + more);
    }

    /// This much work is done.
    pub fn set_current(&self, current: u64) {
        let mut progress = self.progress.get();
        progress.current = current;
        self.progress.set(progress);
    }

    /// More of the work is done.
    pub fn advance(&self, more: u64) {
        self.set_current(self.progress().current + more);
    }

    /// This much was copied, and counts against the speed limit.
    pub fn account(&self, bytes: u64) {
        self.limit.account(bytes, self.handle.now());
    }

    /// In step with the guest from now on.
    pub fn become_ready(&self) {
        if self.status() == Status::Running {
            self.enter(Status::Ready);
            self.tell(JobEvent::Ready(self.report()));
        }
    }

    /// An I/O request has failed: tells so, and does what the policy says.
    pub fn failed(&self, policy: ErrorPolicy, operation: Operation, error: &Error) -> ErrorAction {
        let action = policy.action(error);
        tracing::warn!(job = self.id(), operation = operation.name(), %error,
            action = action.name(), "a job's request failed");
        let id = self.id().to_owned();
        self.tell(JobEvent::Error {
            id,
            operation,
            action,
        });
        if action == ErrorAction::Stop {
            self.io_status.set(IoStatus::after(error));
            self.stop_for_a_while();
        }
        action
    }

    /// The work has ended: well, and the job waits until it is resumed; or not, and a pause is over.
    pub(super) async fn leave_pause(&self, failed: bool) {
        if failed && self.paused.get() {
            self.go_on();
        }
        self.until(|| !self.paused.get()).await;
    }
}

/// A piece of work in flight; ends when dropped.
pub struct Piece {
    job: Rc<Job>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.job.pieces.set(self.job.pieces.get() - 1);
        self.job.settle();
    }
}

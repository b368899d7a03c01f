//! Who is ready to run: a queue without lock for the own thread, one with a lock for the others.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::handle::Handle;
use crate::error::{Error, Result};

/// Names a task of one runtime; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TaskId {
    pub(super) index: usize,
    pub(super) generation: u64,
}

impl TaskId {
    /// The future that `block_on` runs.
    pub(super) const MAIN: TaskId = TaskId {
        index: usize::MAX,
        generation: 0,
    };
}

/// Work for the runtime's thread that comes from another one.
pub(super) type Job = Box<dyn FnOnce(&Handle) + Send>;

/// Ready tasks of one runtime, shared with every waker.
pub(super) struct ReadyQueue {
    /// Identifies the owning thread; 0 after the runtime is gone.
    owner: AtomicUsize,
    local: UnsafeCell<VecDeque<TaskId>>,
    foreign: Mutex<Foreign>,
    /// The eventfd was written and the loop has not looked since.
    notified: AtomicBool,
    event: EventFd,
}

// SAFETY: `local` is only touched by the thread that `owner` names (checked in `with_local`).
unsafe impl Sync for ReadyQueue {}
// SAFETY: nothing in it is bound to a thread but `local`, which a moved queue does not share.
unsafe impl Send for ReadyQueue {}

#[derive(Default)]
struct Foreign {
    tasks: Vec<TaskId>,
    jobs: Vec<Job>,
    closed: bool,
}

impl ReadyQueue {
    /// A queue that the calling thread owns.
    pub(super) fn new() -> Result<ReadyQueue> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::sys(errno, "Could not create an eventfd"))?;
        Ok(ReadyQueue {
            owner: AtomicUsize::new(thread_mark()),
            local: UnsafeCell::new(VecDeque::with_capacity(256)),
            foreign: Mutex::default(),
            notified: AtomicBool::new(false),
            event,
        })
    }

    /// Readable when another thread has pushed something.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn is_owner(&self) -> bool {
        self.owner.load(Ordering::Relaxed) == thread_mark()
    }

    /// Runs `action`, which must not call out, on the local queue. `None` on another thread.
    fn with_local<R>(&self, action: impl FnOnce(&mut VecDeque<TaskId>) -> R) -> Option<R> {
        if !self.is_owner() {
            return None;
        }
        // SAFETY: this is the owning thread, and no `action` below leads back here.
        Some(action(unsafe { &mut *self.local.get() }))
    }

    /// Hands a job to the runtime's thread; false where the runtime is gone.
    pub(super) fn push_job(&self, job: Job) -> bool {
        self.push_foreign(|foreign| foreign.jobs.push(job))
    }

    fn push_foreign(&self, put: impl FnOnce(&mut Foreign)) -> bool {
        let mut foreign = self.lock_foreign();
        if foreign.closed {
            return false;
        }
        put(&mut foreign);
        drop(foreign);
        if !self.notified.swap(true, Ordering::AcqRel)
            && let Err(errno) = self.event.write(1)
        {
            unreachable!("a blocking eventfd with count 0 was not written: {errno}");
        }
        true
    }

    fn lock_foreign(&self) -> MutexGuard<'_, Foreign> {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another thread has pushed something that was not taken yet.
    pub(super) fn is_notified(&self) -> bool {
        self.notified.load(Ordering::Relaxed)
    }

    /// Moves what other threads pushed to the local queue; their jobs are returned.
    pub(super) fn take_foreign(&self) -> Vec<Job> {
        // Cleared before looking: a push after the look writes the eventfd again.
        self.notified.store(false, Ordering::Release);
        let mut foreign = self.lock_foreign();
        let jobs = std::mem::take(&mut foreign.jobs);
        let tasks = std::mem::take(&mut foreign.tasks);
        drop(foreign);
        self.with_local(|queue| queue.extend(tasks));
        jobs
    }

    /// The next ready task, in order.
    pub(super) fn pop(&self) -> Option<TaskId> {
        self.with_local(VecDeque::pop_front)?
    }

    /// The ready task that `draw` (given how many there are) picks.
    pub(super) fn pop_drawn(&self, draw: impl FnOnce(usize) -> usize) -> Option<TaskId> {
        let count = self.len();
        if count == 0 {
            return None;
        }
        let index = draw(count);
        self.with_local(|queue| queue.remove(index))?
    }

    /// Ready tasks in the local queue.
    pub(super) fn len(&self) -> usize {
        self.with_local(|queue| queue.len()).unwrap_or(0)
    }

    /// The runtime is gone: wake-ups and jobs are dropped from now on.
    pub(super) fn close(&self) {
        self.with_local(VecDeque::clear);
        self.owner.store(0, Ordering::Release);
        let mut foreign = self.lock_foreign();
        foreign.closed = true;
        let dropped = (
            std::mem::take(&mut foreign.jobs),
            std::mem::take(&mut foreign.tasks),
        );
        drop(foreign);
        drop(dropped);
    }
}

/// Wakes one task.
pub(super) struct TaskWaker {
    id: TaskId,
    /// It stands in the local queue. Only the owner's thread looks at it and sets it: no order is needed.
    queued: AtomicBool,
    ready: Arc<ReadyQueue>,
}

impl TaskWaker {
    pub(super) fn new(id: TaskId, ready: &Arc<ReadyQueue>) -> Arc<TaskWaker> {
        Arc::new(TaskWaker {
            id,
            queued: AtomicBool::new(false),
            ready: ready.clone(),
        })
    }

    /// To be called before the task is polled: wake-ups from now on queue it again.
    pub(super) fn unqueue(&self) {
        self.queued.store(false, Ordering::Relaxed);
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let queued = self.ready.with_local(|queue| {
            if !self.queued.load(Ordering::Relaxed) {
                self.queued.store(true, Ordering::Relaxed);
                queue.push_back(self.id);
            }
        });
        if queued.is_none() {
            // Each wake-up from another thread is a poll: what it wrote before is seen through the lock.
            self.ready
                .push_foreign(|foreign| foreign.tasks.push(self.id));
        }
    }
}

/// A value that no two living threads share: the address of a thread's own variable.
fn thread_mark() -> usize {
    thread_local! {
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark).addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_have_different_marks() {
        std::thread::scope(|scope| {
            let mine = thread_mark();
            scope.spawn(move || assert_ne!(mine, thread_mark()));
        });
    }

    #[test]
    fn a_closed_queue_takes_no_jobs() {
        let ready = ReadyQueue::new().expect("eventfd");
        assert!(ready.push_job(Box::new(|_| ())));
        ready.close();
        assert!(!ready.push_job(Box::new(|_| ())));
    }
}

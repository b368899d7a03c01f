//! A few threads for system calls that block and that the ring does not have.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

type Work = Box<dyn FnOnce() + Send>;
type Outcome<T> = Result<T, Box<dyn Any + Send>>;

/// Helper threads, started as they are needed and ended with the runtime.
pub(super) struct Pool {
    shared: Arc<PoolShared>,
    most: usize,
    priority: Priority,
}

/// How a pool's threads stand towards others that want a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Priority {
    /// As the thread that made the pool.
    Usual,
    /// Behind: they get what is left, but never nothing, as they may hold locks in the kernel that
    /// others wait for.
    Low,
}

impl Priority {
    /// Of the calling thread, where it can be changed.
    fn take(self) {
        if self == Priority::Low {
            // SAFETY: changes numbers of this thread in the kernel, and touches no memory of ours
            // but the parameter, which is read.
            unsafe {
                let parameter: libc::sched_param = std::mem::zeroed();
                libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter);
                libc::setpriority(libc::PRIO_PROCESS, 0, LOW_NICENESS);
            }
        }
    }
}

/// A tenth of the usual weight.
const LOW_NICENESS: libc::c_int = 10;

#[derive(Default)]
struct PoolShared {
    state: Mutex<PoolState>,
    wake: Condvar,
}

#[derive(Default)]
struct PoolState {
    queue: VecDeque<Work>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Pool {
    pub(super) fn new(most: usize, priority: Priority) -> Pool {
        Pool {
            shared: Arc::default(),
            most: most.max(1),
            priority,
        }
    }

    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Blocking<T> {
        let slot = Arc::new(Mutex::new(Slot::default()));
        let result = slot.clone();
        self.push(Box::new(move || {
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let mut slot = lock(&result);
            slot.outcome = Some(outcome);
            let waker = slot.waker.take();
            drop(slot);
            if let Some(waker) = waker {
                waker.wake();
            }
        }));
        Blocking {
            state: RefCell::new(State::Running(slot)),
        }
    }

    fn push(&self, work: Work) {
        let mut state = lock(&self.shared.state);
        state.queue.push_back(work);
        if state.idle < state.queue.len() && state.threads < self.most {
            self.start_thread(&mut state);
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    fn start_thread(&self, state: &mut PoolState) {
        let (shared, priority) = (self.shared.clone(), self.priority);
        let name = match priority {
            Priority::Usual => "blocking",
            Priority::Low => "background",
        };
        let started = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                priority.take();
                shared.serve();
            });
        match started {
            Ok(_) => state.threads += 1,
            // With one thread at least the work is done, only later.
            Err(error) if state.threads > 0 => tracing::warn!(%error, "helper thread not started"),
            Err(error) => panic!("no helper thread can be started: {error}"),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.state).closed = true;
        self.shared.wake.notify_all();
    }
}

impl PoolShared {
    fn serve(&self) {
        while let Some(work) = self.next_work() {
            work();
        }
    }

    /// The next piece of work; `None` after the pool is closed and all work done.
    fn next_work(&self) -> Option<Work> {
        let mut state = lock(&self.state);
        loop {
            if let Some(work) = state.queue.pop_front() {
                return Some(work);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

/// A thread of one's own for system calls that may block for long, one after the other; it ends
/// when this is dropped and its work is done.
pub struct Worker {
    pool: Pool,
}

impl Worker {
    /// The thread starts with the first work.
    #[allow(
        clippy::new_without_default,
        reason = "a thread is nothing to make by default"
    )]
    pub fn new() -> Worker {
        Worker {
            pool: Pool::new(1, Priority::Usual),
        }
    }

    /// Runs `work` on the thread, after what was asked before, to its end even if the future is
    /// dropped.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Blocking<T> {
        self.pool.run(work)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The result of work on a helper thread.
#[must_use = "the work runs, but nobody learns its result"]
pub struct Blocking<T> {
    state: RefCell<State<T>>,
}

enum State<T> {
    Running(Arc<Mutex<Slot<T>>>),
    Finished(Option<T>),
}

struct Slot<T> {
    outcome: Option<Outcome<T>>,
    waker: Option<Waker>,
}

impl<T> Default for Slot<T> {
    fn default() -> Slot<T> {
        Slot {
            outcome: None,
            waker: None,
        }
    }
}

impl<T> Blocking<T> {
    pub(super) fn finished(result: T) -> Blocking<T> {
        Blocking {
            state: RefCell::new(State::Finished(Some(result))),
        }
    }
}

impl<T> Future for Blocking<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match &mut *self.state.borrow_mut() {
            State::Finished(result) => match result.take() {
                Some(result) => Poll::Ready(result),
                None => unreachable!("polled after its result was taken"),
            },
            State::Running(slot) => {
                let mut slot = lock(slot);
                match slot.outcome.take() {
                    Some(Ok(result)) => Poll::Ready(result),
                    Some(Err(panic)) => resume_unwind(panic),
                    None => {
                        slot.waker = Some(context.waker().clone());
                        Poll::Pending
                    }
                }
            }
        }
    }
}

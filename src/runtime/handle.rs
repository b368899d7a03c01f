//! What code on the I/O thread holds of the runtime.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::blocking::{Blocking, Pool};
use super::clock::{Clock, Instant, Sleep, Timeout, Timers};
use super::polling::{PollPolicy, Polling};
use super::ready::ReadyQueue;
use super::remote::Remote;
use super::ring::Ring;
use super::task::{Task, TaskTable};

/// Everything of a runtime that its thread shares.
pub(super) struct Core {
    pub(super) ready: Arc<ReadyQueue>,
    pub(super) tasks: Rc<TaskTable>,
    pub(super) timers: Timers,
    pub(super) clock: Clock,
    pub(super) ring: Option<Ring>,
    pub(super) pool: Pool,
    pub(super) background: Pool,
    pub(super) polling: Polling,
    pub(super) random: Cell<u64>,
}

/// A clonable reference to the runtime, for code on its thread; passed explicitly.
#[derive(Clone)]
pub struct Handle {
    pub(super) core: Rc<Core>,
}

impl Handle {
    /// Starts a task; it is polled for the first time in the loop's next turn.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        Task::spawn(future, &self.core.tasks, &self.core.ready)
    }

    /// The time now.
    pub fn now(&self) -> Instant {
        self.core.clock.now()
    }

    /// Waits for a duration.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now() + duration)
    }

    /// Waits for a moment.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::until(self.clone(), deadline)
    }

    /// Gives a future a time limit.
    pub fn timeout<F: Future>(&self, limit: Duration, future: F) -> Timeout<F> {
        Timeout::new(future, self.sleep(limit))
    }

    /// Lets every other ready task run first.
    pub fn yield_now(&self) -> YieldNow {
        YieldNow { yielded: false }
    }

    /// The thread's ring. Asserts that there is one: a simulated runtime does no I/O.
    pub fn ring(&self) -> &Ring {
        match &self.core.ring {
            Some(ring) => ring,
            None => unreachable!("a simulated runtime has no ring"),
        }
    }

    /// The clock is virtual and there is no ring.
    pub fn is_simulated(&self) -> bool {
        self.core.ring.is_none()
    }

    /// The next number from the seed (splitmix64); not for secrets.
    pub fn random_u64(&self) -> u64 {
        let state = self.core.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.core.random.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A random number below `bound`, which must not be 0.
    pub fn random_below(&self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below 0");
        // The high half of a product: the bias is below bound / 2^64.
        ((u128::from(self.random_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// How long the loop may look for events before it sleeps, from its next turn on; `None`: what
    /// the runtime was built with.
    pub fn set_poll_policy(&self, policy: Option<PollPolicy>) {
        self.core.polling.set_policy(policy);
    }

    /// What other threads use to reach this one.
    pub fn remote(&self) -> Remote {
        Remote::new(self.core.ready.clone())
    }

    /// Runs a closure that blocks in system calls on a helper thread; in simulation, at once.
    /// The closure runs to its end even if the future is dropped.
    pub fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Blocking<T> {
        if self.is_simulated() {
            return Blocking::finished(work());
        }
        self.core.pool.run(work)
    }

    /// Like [`Handle::blocking`], for long work that nobody waits for at once: on threads that give way
    /// to all others, no more than there are processors.
    pub fn background<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Blocking<T> {
        if self.is_simulated() {
            return Blocking::finished(work());
        }
        self.core.background.run(work)
    }

    /// Tasks that have not ended.
    pub fn tasks(&self) -> usize {
        self.core.tasks.len()
    }

    pub(super) fn timers(&self) -> &Timers {
        &self.core.timers
    }
}

/// Is pending once.
#[must_use = "a future does nothing unless awaited"]
pub struct YieldNow {
    yielded: bool,
}

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.yielded {
            return Poll::Ready(());
        }
        self.yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

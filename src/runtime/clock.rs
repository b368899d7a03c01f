//! Time: real (monotonic) or virtual, and the futures that wait for it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::{Add, Sub};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::handle::Handle;

/// A moment: the time since the runtime started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    /// Since the runtime's start.
    pub fn since_start(self) -> Duration {
        self.0
    }

    /// How long `earlier` lies back; zero where it does not.
    pub fn saturating_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    /// Saturates at the end of time.
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(duration))
    }
}

impl Sub for Instant {
    type Output = Duration;

    /// Saturates at zero.
    fn sub(self, earlier: Instant) -> Duration {
        self.saturating_since(earlier)
    }
}

/// The runtime's source of time.
pub(super) enum Clock {
    Real(std::time::Instant),
    Virtual(Cell<Duration>),
}

impl Clock {
    pub(super) fn real() -> Clock {
        Clock::Real(std::time::Instant::now())
    }

    pub(super) fn simulated() -> Clock {
        Clock::Virtual(Cell::new(Duration::ZERO))
    }

    pub(super) fn now(&self) -> Instant {
        match self {
            Clock::Real(start) => Instant(start.elapsed()),
            Clock::Virtual(now) => Instant(now.get()),
        }
    }

    /// Moves virtual time forward; real time moves by itself.
    pub(super) fn advance_to(&self, then: Instant) {
        if let Clock::Virtual(now) = self {
            now.set(now.get().max(then.0));
        }
    }
}

/// Names a pending timer; the number tells timers of one moment apart, in order of creation.
type TimerKey = (Instant, u64);

/// Pending timers.
#[derive(Default)]
pub(super) struct Timers {
    pending: RefCell<BTreeMap<TimerKey, Waker>>,
    next: Cell<u64>,
}

impl Timers {
    fn add(&self, deadline: Instant, waker: Waker) -> TimerKey {
        let number = self.next.get();
        self.next.set(number + 1);
        self.pending.borrow_mut().insert((deadline, number), waker);
        (deadline, number)
    }

    fn update(&self, key: TimerKey, waker: &Waker) {
        if let Some(old) = self.pending.borrow_mut().get_mut(&key) {
            old.clone_from(waker);
        }
    }

    fn remove(&self, key: TimerKey) {
        let removed = self.pending.borrow_mut().remove(&key);
        drop(removed);
    }

    /// When the next timer is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let pending = self.pending.borrow();
        pending
            .first_key_value()
            .map(|((deadline, _), _)| *deadline)
    }

    /// Wakes everyone whose time has come, reading the clock only if anyone waits.
    pub(super) fn fire_if_any(&self, clock: &Clock) {
        if !self.pending.borrow().is_empty() {
            self.fire(clock.now());
        }
    }

    /// Wakes everyone whose time is at or before `now`.
    pub(super) fn fire(&self, now: Instant) {
        while let Some(waker) = self.pop_due(now) {
            waker.wake();
        }
    }

    fn pop_due(&self, now: Instant) -> Option<Waker> {
        let mut pending = self.pending.borrow_mut();
        let first = pending.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    pub(super) fn clear(&self) {
        let cleared = std::mem::take(&mut *self.pending.borrow_mut());
        drop(cleared);
    }
}

/// Waits for a moment.
#[must_use = "a future does nothing unless awaited"]
pub struct Sleep {
    handle: Handle,
    deadline: Instant,
    timer: Option<TimerKey>,
}

impl Sleep {
    pub(super) fn until(handle: Handle, deadline: Instant) -> Sleep {
        Sleep {
            handle,
            deadline,
            timer: None,
        }
    }

    /// The moment it waits for.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.handle.now() >= self.deadline {
            return Poll::Ready(());
        }
        let timers = self.handle.timers();
        match self.timer {
            Some(key) => timers.update(key, context.waker()),
            None => {
                let key = timers.add(self.deadline, context.waker().clone());
                self.timer = Some(key);
            }
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.timer {
            self.handle.timers().remove(key);
        }
    }
}

/// Time ran out before the future was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("time limit passed")
    }
}

impl std::error::Error for Elapsed {}

/// A future with a time limit; at the limit the future is dropped with this.
#[must_use = "a future does nothing unless awaited"]
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    limit: Sleep,
}

impl<F: Future> Timeout<F> {
    pub(super) fn new(future: F, limit: Sleep) -> Timeout<F> {
        Timeout {
            future: Box::pin(future),
            limit,
        }
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.limit)
            .poll(context)
            .map(|()| Err(Elapsed))
    }
}

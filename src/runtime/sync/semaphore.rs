//! A fair counting semaphore: the base of the locks.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::waiters::{WaiterId, Waiters};

/// Permits that tasks take and give back, first come, first served: a large request at the head is
/// not overtaken by small ones behind it.
pub struct Semaphore {
    state: RefCell<State>,
}

struct State {
    permits: usize,
    waiters: Waiters<usize>,
}

impl Semaphore {
    /// With this many permits.
    pub const fn new(permits: usize) -> Semaphore {
        let state = State {
            permits,
            waiters: Waiters::new(),
        };
        Semaphore {
            state: RefCell::new(state),
        }
    }

    /// Waits for `count` permits.
    pub fn acquire(&self, count: usize) -> Acquire<&Semaphore> {
        Acquire::new(self, count)
    }

    /// Like [`Semaphore::acquire`], with a permit that keeps the semaphore alive.
    pub fn acquire_owned(self: &Rc<Semaphore>, count: usize) -> Acquire<Rc<Semaphore>> {
        Acquire::new(self.clone(), count)
    }

    /// Takes `count` permits if that needs no waiting.
    pub fn try_acquire(&self, count: usize) -> Option<Permit<'_>> {
        self.take(count).then(|| Permit {
            semaphore: self,
            count,
        })
    }

    /// Adds permits, or gives back forgotten ones.
    pub fn release(&self, count: usize) {
        self.state.borrow_mut().permits += count;
        self.grant();
    }

    /// Permits that nobody holds.
    pub fn available(&self) -> usize {
        self.state.borrow().permits
    }

    /// Somebody waits.
    pub fn has_waiters(&self) -> bool {
        !self.state.borrow().waiters.is_empty()
    }

    fn take(&self, count: usize) -> bool {
        let mut state = self.state.borrow_mut();
        let free = state.waiters.is_empty() && state.permits >= count;
        if free {
            state.permits -= count;
        }
        free
    }

    /// Gives permits to the waiters at the head. A waiter that is in the queue no more has them.
    fn grant(&self) {
        loop {
            let mut state = self.state.borrow_mut();
            let enough = match state.waiters.front() {
                Some(front) => front.wants <= state.permits,
                None => false,
            };
            if !enough {
                return;
            }
            let Some(waiter) = state.waiters.pop() else {
                return;
            };
            state.permits -= waiter.wants;
            drop(state);
            waiter.wake();
        }
    }

    /// A waiter gives up: out of the queue, or its permits back.
    fn give_up(&self, id: WaiterId, count: usize) {
        let removed = self.state.borrow_mut().waiters.remove(id);
        match removed {
            // The next one may want less.
            Some(_) => self.grant(),
            None => self.release(count),
        }
    }
}

/// How a permit refers to its semaphore.
pub trait SemaphoreRef: Clone {
    /// What the acquired permits are held by.
    type Permit;
    /// The semaphore.
    fn semaphore(&self) -> &Semaphore;
    /// Wraps permits that were taken.
    fn permit(self, count: usize) -> Self::Permit;
}

impl<'a> SemaphoreRef for &'a Semaphore {
    type Permit = Permit<'a>;

    fn semaphore(&self) -> &Semaphore {
        self
    }

    fn permit(self, count: usize) -> Permit<'a> {
        Permit {
            semaphore: self,
            count,
        }
    }
}

impl SemaphoreRef for Rc<Semaphore> {
    type Permit = OwnedPermit;

    fn semaphore(&self) -> &Semaphore {
        self
    }

    fn permit(self, count: usize) -> OwnedPermit {
        OwnedPermit {
            semaphore: self,
            count,
        }
    }
}

/// Waits for permits.
#[must_use = "a future does nothing unless awaited"]
pub struct Acquire<S: SemaphoreRef> {
    semaphore: S,
    count: usize,
    state: AcquireState,
}

#[derive(Clone, Copy)]
enum AcquireState {
    New,
    Waiting(WaiterId),
    Done,
}

impl<S: SemaphoreRef> Acquire<S> {
    fn new(semaphore: S, count: usize) -> Acquire<S> {
        Acquire {
            semaphore,
            count,
            state: AcquireState::New,
        }
    }

    fn is_granted(&mut self, context: &mut Context<'_>) -> bool {
        let semaphore = self.semaphore.semaphore();
        match self.state {
            AcquireState::New => {
                if semaphore.take(self.count) {
                    return true;
                }
                let waiters = &mut semaphore.state.borrow_mut().waiters;
                self.state = AcquireState::Waiting(waiters.push(self.count, context.waker()));
                false
            }
            AcquireState::Waiting(id) => {
                let waiters = &mut semaphore.state.borrow_mut().waiters;
                !waiters.update(id, context.waker())
            }
            AcquireState::Done => unreachable!("polled after its permit was taken"),
        }
    }
}

impl<S: SemaphoreRef + Unpin> Future for Acquire<S> {
    type Output = S::Permit;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<S::Permit> {
        if !self.is_granted(context) {
            return Poll::Pending;
        }
        self.state = AcquireState::Done;
        Poll::Ready(self.semaphore.clone().permit(self.count))
    }
}

impl<S: SemaphoreRef> Drop for Acquire<S> {
    fn drop(&mut self) {
        if let AcquireState::Waiting(id) = self.state {
            self.semaphore.semaphore().give_up(id, self.count);
        }
    }
}

/// Permits, given back on drop.
#[must_use = "permits are given back when this is dropped"]
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
    count: usize,
}

impl Permit<'_> {
    /// Keeps the permits taken for ever, or until [`Semaphore::release`].
    pub fn forget(mut self) {
        self.count = 0;
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.semaphore.release(self.count);
    }
}

/// Permits that keep their semaphore alive, given back on drop.
#[must_use = "permits are given back when this is dropped"]
pub struct OwnedPermit {
    semaphore: Rc<Semaphore>,
    count: usize,
}

impl Drop for OwnedPermit {
    fn drop(&mut self) {
        self.semaphore.release(self.count);
    }
}

//! Locks on byte ranges, first come first served.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::range::ByteRange;

/// Whether others may hold the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// With other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// Locks over the bytes of a node. A request waits for conflicting holders and for conflicting
/// requests that came before it, so that nobody starves. Dropping a waiting future gives its place up.
#[derive(Clone, Default)]
pub struct RangeLock {
    state: Rc<RefCell<State>>,
}

#[derive(Default)]
struct State {
    held: Vec<Claim>,
    waiting: VecDeque<(Claim, Waker)>,
    next: u64,
}

#[derive(Clone, Copy)]
struct Claim {
    ticket: u64,
    range: ByteRange,
    mode: LockMode,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        let exclusive = self.mode == LockMode::Exclusive || other.mode == LockMode::Exclusive;
        exclusive && self.range.overlaps(&other.range)
    }
}

impl State {
    fn is_free(&self, claim: &Claim) -> bool {
        let earlier = self
            .waiting
            .iter()
            .take_while(|(other, _)| other.ticket != claim.ticket);
        !self.held.iter().any(|held| held.conflicts(claim))
            && !earlier
                .map(|(other, _)| other)
                .any(|other| other.conflicts(claim))
    }

    fn claim(&mut self, range: ByteRange, mode: LockMode) -> Claim {
        let ticket = self.next;
        self.next += 1;
        Claim {
            ticket,
            range,
            mode,
        }
    }

    fn forget_waiting(&mut self, ticket: u64) {
        self.waiting.retain(|(claim, _)| claim.ticket != ticket);
    }

    /// Wakes those whose turn it may be now; each looks for itself.
    fn wake_free(&self) {
        for (claim, waker) in &self.waiting {
            if self.is_free(claim) {
                waker.wake_by_ref();
            }
        }
    }
}

impl RangeLock {
    /// Nothing is locked.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    /// The lock at once, or `None` where it would have to wait.
    pub fn try_lock(&self, range: ByteRange, mode: LockMode) -> Option<RangeGuard> {
        let mut state = self.state.borrow_mut();
        let claim = state.claim(range, mode);
        if !state.is_free(&claim) {
            return None;
        }
        state.held.push(claim);
        Some(RangeGuard {
            lock: self.clone(),
            ticket: claim.ticket,
        })
    }

    /// Waits for the lock.
    pub fn lock(&self, range: ByteRange, mode: LockMode) -> Acquire {
        let claim = self.state.borrow_mut().claim(range, mode);
        Acquire {
            lock: self.clone(),
            claim,
            done: false,
        }
    }

    /// Somebody holds or waits for a byte of the range.
    pub fn is_contended(&self, range: &ByteRange) -> bool {
        let state = self.state.borrow();
        let held = state.held.iter();
        held.chain(state.waiting.iter().map(|(claim, _)| claim))
            .any(|claim| claim.range.overlaps(range))
    }
}

/// The future of [`RangeLock::lock`].
pub struct Acquire {
    lock: RangeLock,
    claim: Claim,
    done: bool,
}

impl Future for Acquire {
    type Output = RangeGuard;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RangeGuard> {
        let ticket = self.claim.ticket;
        let lock = self.lock.clone();
        let mut state = lock.state.borrow_mut();
        if state.is_free(&self.claim) {
            state.forget_waiting(ticket);
            state.held.push(self.claim);
            self.done = true;
            return Poll::Ready(RangeGuard {
                lock: lock.clone(),
                ticket,
            });
        }
        let waker = context.waker().clone();
        match state
            .waiting
            .iter_mut()
            .find(|(claim, _)| claim.ticket == ticket)
        {
            Some(place) => place.1 = waker,
            None => state.waiting.push_back((self.claim, waker)),
        }
        Poll::Pending
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if !self.done {
            let mut state = self.lock.state.borrow_mut();
            state.forget_waiting(self.claim.ticket);
            state.wake_free();
        }
    }
}

/// A held lock, released when dropped.
pub struct RangeGuard {
    lock: RangeLock,
    ticket: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.lock.state.borrow_mut();
        state.held.retain(|claim| claim.ticket != self.ticket);
        state.wake_free();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll_once(acquire: &mut Pin<Box<Acquire>>) -> Option<RangeGuard> {
        let mut context = Context::from_waker(Waker::noop());
        match acquire.as_mut().poll(&mut context) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end)
    }

    #[test]
    fn exclusive_excludes_and_shared_shares() {
        let lock = RangeLock::new();
        let first = lock.try_lock(range(0, 10), LockMode::Shared);
        assert!(first.is_some());
        assert!(lock.try_lock(range(5, 15), LockMode::Shared).is_some());
        assert!(lock.try_lock(range(9, 10), LockMode::Exclusive).is_none());
        assert!(lock.try_lock(range(10, 20), LockMode::Exclusive).is_some());
    }

    #[test]
    fn later_requests_do_not_overtake_a_waiting_one() {
        let lock = RangeLock::new();
        let held = lock.try_lock(range(0, 10), LockMode::Shared);
        let mut writer = Box::pin(lock.lock(range(0, 10), LockMode::Exclusive));
        assert!(poll_once(&mut writer).is_none());
        assert!(lock.try_lock(range(0, 10), LockMode::Shared).is_none());
        drop(held);
        let guard = poll_once(&mut writer);
        assert!(guard.is_some());
        drop(guard);
        assert!(lock.try_lock(range(0, 10), LockMode::Shared).is_some());
    }

    #[test]
    fn a_dropped_waiter_gives_its_place_up() {
        let lock = RangeLock::new();
        let held = lock.try_lock(range(0, 10), LockMode::Shared);
        let mut writer = Box::pin(lock.lock(range(0, 10), LockMode::Exclusive));
        assert!(poll_once(&mut writer).is_none());
        drop(writer);
        assert!(lock.try_lock(range(0, 10), LockMode::Shared).is_some());
        drop(held);
    }
}

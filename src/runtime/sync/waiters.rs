//! A queue of waiting futures, in order of arrival.

use std::collections::VecDeque;
use std::task::Waker;

/// Names a waiting future; grows with arrival.
pub(super) type WaiterId = u64;

pub(super) struct Waiter<T> {
    pub(super) id: WaiterId,
    pub(super) wants: T,
    waker: Waker,
}

impl<T> Waiter<T> {
    pub(super) fn wake(self) {
        self.waker.wake();
    }
}

/// Waiting futures, the longest waiting first.
pub(super) struct Waiters<T> {
    queue: VecDeque<Waiter<T>>,
    next: WaiterId,
}

impl<T> Waiters<T> {
    pub(super) const fn new() -> Waiters<T> {
        Waiters {
            queue: VecDeque::new(),
            next: 0,
        }
    }

    pub(super) fn push(&mut self, wants: T, waker: &Waker) -> WaiterId {
        let id = self.next;
        self.next += 1;
        self.queue.push_back(Waiter {
            id,
            wants,
            waker: waker.clone(),
        });
        id
    }

    /// Renews a waiter's waker; false if it waits no more.
    pub(super) fn update(&mut self, id: WaiterId, waker: &Waker) -> bool {
        match self.position(id) {
            Some(index) => {
                self.queue[index].waker.clone_from(waker);
                true
            }
            None => false,
        }
    }

    /// Takes a waiter out; `None` if it waits no more.
    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Waiter<T>> {
        self.position(id).and_then(|index| self.queue.remove(index))
    }

    pub(super) fn front(&self) -> Option<&Waiter<T>> {
        self.queue.front()
    }

    pub(super) fn pop(&mut self) -> Option<Waiter<T>> {
        self.queue.pop_front()
    }

    /// Takes all waiters out; ids go on growing.
    pub(super) fn take(&mut self) -> Waiters<T> {
        let rest = Waiters {
            queue: VecDeque::new(),
            next: self.next,
        };
        std::mem::replace(self, rest)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Arrival order is id order.
    fn position(&self, id: WaiterId) -> Option<usize> {
        self.queue
            .binary_search_by_key(&id, |waiter| waiter.id)
            .ok()
    }
}

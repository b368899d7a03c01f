//! The slab of operations in flight, keyed by what travels as user data.

use std::any::Any;
use std::rc::Rc;
use std::task::{Poll, Waker};

use io_uring::squeue;
use slab::Slab;

use super::RingFile;
use crate::buffer::Payload;

/// Attempts at an operation that the kernel answers with `EAGAIN` or `EINTR`.
const MOST_RETRIES: u8 = 16;

/// Names one operation: slot and generation, so that a stale completion is a noticed bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

impl Key {
    pub(super) fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(super) fn from_user_data(user_data: u64) -> Key {
        Key {
            index: user_data as u32,
            generation: (user_data >> 32) as u32,
        }
    }
}

/// What must outlive the kernel's work on an operation.
#[derive(Default)]
pub(crate) struct Kept {
    #[expect(dead_code, reason = "held, not read: its drop closes the file")]
    pub(crate) file: Option<Rc<RingFile>>,
    pub(crate) payload: Option<Payload>,
    /// What the entry points to beside the payload.
    pub(crate) argument: Option<Rc<dyn Any>>,
    /// Whatever the caller wants to outlive the operation.
    pub(crate) guard: Option<Rc<dyn Any>>,
}

/// How an operation behaves beside its entry.
#[derive(Default)]
pub(crate) struct InFlight {
    pub(crate) kept: Kept,
    /// Try again on `EAGAIN` and `EINTR`.
    pub(crate) retry: bool,
    /// A result that is not negative is a descriptor to close if nobody takes it.
    pub(crate) yields_descriptor: bool,
}

enum State {
    Pending { waker: Option<Waker>, orphan: bool },
    Done(i32),
}

struct Slot {
    generation: u32,
    state: State,
    entry: InFlight,
    sqe: Option<squeue::Entry>,
    retries: u8,
}

/// What the ring does after a completion.
pub(super) enum Completed {
    /// Drop what was kept, wake who waits.
    Delivered(Kept, Option<Waker>),
    /// Submit this again.
    Retry(squeue::Entry),
}

/// All operations of a ring.
pub(super) struct InFlightTable {
    slots: Slab<Slot>,
    generation: u32,
    pending: usize,
}

impl InFlightTable {
    pub(super) fn new(capacity: usize) -> InFlightTable {
        InFlightTable {
            slots: Slab::with_capacity(capacity),
            generation: 0,
            pending: 0,
        }
    }

    /// Operations without a completion.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    pub(super) fn insert(&mut self, sqe: squeue::Entry, entry: InFlight) -> (Key, squeue::Entry) {
        // 31 bits: the all-ones user data stays free for completions that nobody waits for.
        self.generation = (self.generation + 1) & (u32::MAX >> 1);
        let index = self.slots.vacant_key();
        let key = Key {
            index: u32::try_from(index).unwrap_or_else(|_| unreachable!("4 G operations")),
            generation: self.generation,
        };
        let sqe = sqe.user_data(key.user_data());
        let again = entry.retry.then(|| sqe.clone());
        self.slots.insert(Slot {
            generation: self.generation,
            state: State::Pending {
                waker: None,
                orphan: false,
            },
            entry,
            sqe: again,
            retries: 0,
        });
        self.pending += 1;
        (key, sqe)
    }

    fn slot(&mut self, key: Key) -> &mut Slot {
        match self.slots.get_mut(key.index as usize) {
            Some(slot) if slot.generation == key.generation => slot,
            _ => unreachable!("operation {key:?} is not in flight"),
        }
    }

    pub(super) fn complete(&mut self, key: Key, result: i32) -> Completed {
        let slot = self.slot(key);
        let State::Pending { waker, orphan } = &mut slot.state else {
            unreachable!("operation {key:?} completed twice")
        };
        let (waker, orphan) = (waker.take(), *orphan);
        if !orphan
            && matches!(-result, libc::EAGAIN | libc::EINTR)
            && slot.retries < MOST_RETRIES
            && let Some(sqe) = &slot.sqe
        {
            slot.retries += 1;
            slot.state = State::Pending { waker, orphan };
            // In a worker thread the kernel may block, so EAGAIN has no cause to come again.
            return Completed::Retry(sqe.clone().flags(squeue::Flags::ASYNC));
        }
        let kept = std::mem::take(&mut slot.entry.kept);
        slot.state = State::Done(result);
        self.pending -= 1;
        if orphan {
            self.discard(key);
        }
        Completed::Delivered(kept, waker)
    }

    /// The result, once: the key is void afterwards. Until it is there, `new` is who waits.
    pub(super) fn poll(&mut self, key: Key, new: &Waker) -> Poll<i32> {
        match &mut self.slot(key).state {
            State::Done(result) => {
                let result = *result;
                self.slots.remove(key.index as usize);
                return Poll::Ready(result);
            }
            State::Pending { waker, .. } => match waker {
                Some(old) => old.clone_from(new),
                None => *waker = Some(new.clone()),
            },
        }
        Poll::Pending
    }

    /// Adds something to keep until the completion.
    pub(super) fn keep(&mut self, key: Key, guard: Rc<dyn Any>) {
        let slot = self.slot(key);
        if matches!(slot.state, State::Pending { .. }) {
            slot.entry.kept.guard = Some(guard);
        }
    }

    /// The future is gone: the entry stays until the completion. True where one is still to come.
    pub(super) fn abandon(&mut self, key: Key) -> bool {
        if let State::Pending { waker, orphan } = &mut self.slot(key).state {
            *waker = None;
            *orphan = true;
            return true;
        }
        self.discard(key);
        false
    }

    fn discard(&mut self, key: Key) {
        let slot = self.slots.remove(key.index as usize);
        if let State::Done(result) = slot.state
            && slot.entry.yields_descriptor
            && result >= 0
        {
            // Nobody took the accepted connection.
            let _ = nix::unistd::close(result);
        }
    }

    /// The runtime ends: every operation still pending loses its future.
    pub(super) fn orphan_all(&mut self) -> Vec<Key> {
        let mut keys = Vec::new();
        for (index, slot) in &mut self.slots {
            if let State::Pending { waker, .. } = &mut slot.state {
                *waker = None;
                keys.push(Key {
                    index: index as u32,
                    generation: slot.generation,
                });
            }
        }
        keys
    }

    /// Gives up on operations that do not complete: what they keep is never freed.
    pub(super) fn leak_pending(&mut self) -> usize {
        for (_, slot) in &mut self.slots {
            std::mem::forget(std::mem::take(&mut slot.entry.kept));
        }
        self.pending
    }
}

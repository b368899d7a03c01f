//! The future of one operation.

use std::any::Any;
use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::{FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use io_uring::squeue;
use nix::errno::Errno;

use super::Ring;
use super::inflight::{InFlight, Key};
use crate::error::{Error, Result};

/// What a raw result means for one kind of operation.
pub trait OpOutput: Unpin {
    /// Never loses an errno: a negative `raw` is an error with that errno.
    fn from_raw(raw: i32) -> Self;
}

impl OpOutput for Result<usize> {
    fn from_raw(raw: i32) -> Result<usize> {
        usize::try_from(raw).map_err(|_| error_of(raw))
    }
}

impl OpOutput for Result<()> {
    fn from_raw(raw: i32) -> Result<()> {
        if raw < 0 { Err(error_of(raw)) } else { Ok(()) }
    }
}

impl OpOutput for Result<OwnedFd> {
    fn from_raw(raw: i32) -> Result<OwnedFd> {
        if raw < 0 {
            return Err(error_of(raw));
        }
        // SAFETY: the kernel made this descriptor for this operation; it has no other owner.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

/// The result as the kernel gave it, for commands whose meaning the caller knows.
impl OpOutput for i32 {
    fn from_raw(raw: i32) -> i32 {
        raw
    }
}

fn error_of(raw: i32) -> Error {
    Error::from(Errno::from_raw(-raw))
}

/// What dropping the future does to the operation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnDrop {
    /// It runs on, unobserved.
    RunOn,
    /// It may wait for ever (a socket, a poll), so the kernel is asked to cancel it.
    Cancel,
}

/// An operation in flight. It was submitted when this was made, and does not stop when this is
/// dropped: the ring keeps buffer, file and guard until the completion. Operations that may wait
/// for ever (accept, receive, send, connect, poll) are cancelled on drop; data that such an
/// operation had moved already is then lost.
#[must_use = "the operation runs, but nobody learns its result"]
pub struct Op<T: OpOutput> {
    ring: Ring,
    key: Option<Key>,
    on_drop: OnDrop,
    output: PhantomData<T>,
}

impl<T: OpOutput> Op<T> {
    pub(super) fn start(
        ring: &Ring,
        sqe: squeue::Entry,
        entry: InFlight,
        on_drop: OnDrop,
    ) -> Op<T> {
        let key = ring.start(sqe, entry);
        Op {
            ring: ring.clone(),
            key: Some(key),
            on_drop,
            output: PhantomData,
        }
    }

    /// Keeps `guard` alive until the completion, whatever happens to this future.
    pub fn keep(self, guard: Rc<dyn Any>) -> Op<T> {
        if let Some(key) = self.key {
            self.ring.shared.in_flight.borrow_mut().keep(key, guard);
        }
        self
    }

    /// Asks the kernel to cancel; the future still completes, perhaps with `ECANCELED`.
    pub fn cancel(&self) {
        if let Some(key) = self.key {
            self.ring.cancel_key(key);
        }
    }
}

impl<T: OpOutput> Future for Op<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(key) = self.key else {
            unreachable!("an operation was polled after its result was taken")
        };
        let mut table = self.ring.shared.in_flight.borrow_mut();
        let polled = table.poll(key, context.waker());
        drop(table);
        polled.map(|raw| {
            self.key = None;
            T::from_raw(raw)
        })
    }
}

impl<T: OpOutput> Drop for Op<T> {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let pending = self.ring.shared.in_flight.borrow_mut().abandon(key);
        if pending && self.on_drop == OnDrop::Cancel {
            self.ring.cancel_key(key);
        }
    }
}

//! One io_uring: submission, completion, and the slab of operations in flight.
//!
//! This is the only place that talks to the kernel's rings. It knows operations by a typed slab key
//! (see [`inflight`]), never by raw pointers. It is not an executor: the loop in `runtime` enters it.
//!
//! Invariants:
//! - An operation is submitted when its future is created, not when it is first polled.
//! - A dropped future does not stop an I/O: the slab keeps its buffer, file and guard until the
//!   completion arrives (also when the whole runtime is dropped).
//! - No completion is lost: a full submission queue is submitted, then spills into a backlog; an
//!   overflown completion queue is flushed by the next enter.

#![allow(unsafe_code)]

mod buffers;
mod file;
mod inflight;
mod op;
mod requests;
mod setup;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::time::{Duration, Instant};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;

use crate::error::Result;
use crate::runtime::Config;

pub use buffers::BufferSlots;
pub use file::RingFile;
pub use op::{Op, OpOutput};
pub use requests::{FsyncKind, WriteFlags};

use buffers::BufferTable;
use file::FileSlots;
use inflight::{Completed, InFlight, InFlightTable, Key};

/// Completions with this user data are of interest to nobody.
const IGNORED: u64 = u64::MAX;
/// Completions copied out of the ring at a time.
const REAP_BATCH: usize = 64;
/// How long a dropped ring waits for the kernel to let go of buffers.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(10);

/// The ring of an I/O thread; clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    shared: Rc<Shared>,
}

struct Shared {
    uring: RefCell<IoUring>,
    in_flight: RefCell<InFlightTable>,
    backlog: RefCell<VecDeque<squeue::Entry>>,
    slots: FileSlots,
    buffers: BufferTable,
    enters: Cell<u64>,
}

impl Ring {
    /// Builds the ring with the best mode that the kernel has.
    pub(crate) fn new(config: &Config) -> Result<Ring> {
        let uring = setup::build(config)?;
        let buffer_slots = setup::register_buffer_table(&uring, config.buffer_slots);
        let slots = FileSlots::register(&uring, config.file_slots);
        Ok(Ring {
            shared: Rc::new(Shared {
                uring: RefCell::new(uring),
                in_flight: RefCell::new(InFlightTable::new(config.entries as usize)),
                backlog: RefCell::new(VecDeque::new()),
                slots,
                buffers: BufferTable::new(buffer_slots),
                enters: Cell::new(0),
            }),
        })
    }

    /// Operations whose completion has not arrived.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.borrow().pending()
    }

    /// Calls of io_uring_enter so far.
    pub fn enters(&self) -> u64 {
        self.shared.enters.get()
    }

    /// Puts an operation in flight; the slab owns `entry` until its completion.
    pub(crate) fn start(&self, sqe: squeue::Entry, entry: InFlight) -> Key {
        let (key, sqe) = self.shared.in_flight.borrow_mut().insert(sqe, entry);
        self.push(sqe);
        key
    }

    /// Asks the kernel to cancel; the operation completes in any case, perhaps with `ECANCELED`.
    pub(crate) fn cancel_key(&self, key: Key) {
        let cancel = opcode::AsyncCancel::new(key.user_data()).build();
        self.push(cancel.user_data(IGNORED));
    }

    /// Queues an entry, submitting what is queued where there is no room.
    fn push(&self, sqe: squeue::Entry) {
        let mut backlog = self.shared.backlog.borrow_mut();
        if !backlog.is_empty() {
            backlog.push_back(sqe);
            return;
        }
        if self.try_push(&sqe) {
            return;
        }
        drop(backlog);
        self.enter(0, None);
        if !self.try_push(&sqe) {
            self.shared.backlog.borrow_mut().push_back(sqe);
        }
    }

    fn try_push(&self, sqe: &squeue::Entry) -> bool {
        let mut uring = self.shared.uring.borrow_mut();
        // SAFETY: everything the entry points to is kept by the slab until the completion.
        unsafe { uring.submission().push(sqe).is_ok() }
    }

    /// Something waits to be told to the kernel, or the kernel has completions to hand over.
    pub(crate) fn needs_enter(&self) -> bool {
        let mut uring = self.shared.uring.borrow_mut();
        let queue = uring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Submits everything and waits for `want` completions, at most for `limit`. Also without
    /// waiting, the kernel hands over what it has.
    pub(crate) fn enter(&self, want: usize, limit: Option<Duration>) {
        self.shared.enters.set(self.shared.enters.get() + 1);
        let entered = match limit {
            Some(limit) => {
                let time = types::Timespec::from(limit);
                let arguments = types::SubmitArgs::new().timespec(&time);
                let uring = self.shared.uring.borrow();
                uring.submitter().submit_with_args(want, &arguments)
            }
            None => self.submit(want),
        };
        let Err(error) = entered else { return };
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
        // Time passed, a signal, or completions must be reaped first: the loop comes again.
        let harmless = [
            Errno::ETIME,
            Errno::EINTR,
            Errno::EBUSY,
            Errno::EAGAIN,
            Errno::ENOMEM,
        ];
        assert!(harmless.contains(&errno), "io_uring_enter failed: {error}");
    }

    fn submit(&self, want: usize) -> io::Result<usize> {
        let mut uring = self.shared.uring.borrow_mut();
        let queued = uring.submission().len() as u32;
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument is passed, so that the kernel is given no pointer.
        unsafe {
            uring
                .submitter()
                .enter::<libc::sigset_t>(queued, want as u32, flags, None)
        }
    }

    /// Submits what is queued and takes what the kernel has, where there is anything of either.
    pub(crate) fn flush(&self) {
        if self.needs_enter() {
            self.enter(0, None);
        }
    }

    /// Completions can be reaped, or the kernel has some to hand over.
    pub(crate) fn has_news(&self) -> bool {
        let mut uring = self.shared.uring.borrow_mut();
        let queue = uring.submission();
        if queue.taskrun() || queue.cq_overflow() {
            return true;
        }
        drop(queue);
        !uring.completion().is_empty()
    }

    /// Moves the backlog into the submission queue as far as there is room.
    pub(crate) fn refill(&self) {
        loop {
            let Some(sqe) = self.shared.backlog.borrow_mut().pop_front() else {
                return;
            };
            if !self.try_push(&sqe) {
                self.shared.backlog.borrow_mut().push_front(sqe);
                return;
            }
        }
    }

    /// Entries that wait for room in the submission queue.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.shared.backlog.borrow().is_empty()
    }

    /// Hands over every completion that has arrived: results to futures, kept things dropped.
    pub(crate) fn reap(&self) -> usize {
        let mut entries = [const { MaybeUninit::<cqueue::Entry>::uninit() }; REAP_BATCH];
        let mut reaped = 0;
        loop {
            // Copied out first: what a completion drops or wakes may use the ring.
            let arrived = self.fill(&mut entries);
            for entry in arrived.iter() {
                self.complete(entry.user_data(), entry.result());
            }
            reaped += arrived.len();
            if arrived.len() < REAP_BATCH {
                return reaped;
            }
        }
    }

    fn fill<'a>(&self, entries: &'a mut [MaybeUninit<cqueue::Entry>]) -> &'a [cqueue::Entry] {
        self.shared.uring.borrow_mut().completion().fill(entries)
    }

    fn complete(&self, user_data: u64, result: i32) {
        if user_data == IGNORED {
            return;
        }
        let key = Key::from_user_data(user_data);
        let completed = self.shared.in_flight.borrow_mut().complete(key, result);
        // Wake and drop with no borrow held: what was kept may use the ring in its own drop.
        match completed {
            Completed::Delivered(kept, waker) => {
                drop(kept);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Completed::Retry(sqe) => self.push(sqe),
        }
    }

    /// Cancels what is in flight and waits until the kernel has let go of every buffer; what it
    /// still holds after a time limit is leaked, as freeing it could corrupt memory.
    pub(crate) fn shut_down(&self) {
        for key in self.shared.in_flight.borrow_mut().orphan_all() {
            self.cancel_key(key);
        }
        let deadline = Instant::now() + TEARDOWN_LIMIT;
        while self.in_flight() > 0 && Instant::now() < deadline {
            self.refill();
            self.enter(1, Some(Duration::from_millis(100)));
            self.reap();
        }
        let left = self.shared.in_flight.borrow_mut().leak_pending();
        if left > 0 {
            tracing::error!(operations = left, "kernel still holds buffers at teardown");
        }
    }
}

#[cfg(test)]
mod tests;

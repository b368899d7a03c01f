//! The power supply of simulated disks: one failure stops them all at the same moment.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use crate::runtime::sync::Event;

/// Counts the operations of all disks that hang on it and fails at a chosen one.
#[derive(Clone, Default)]
pub struct Power {
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    operations: Cell<u64>,
    fail_at: Cell<Option<u64>>,
    marks: RefCell<Vec<u64>>,
    off: Event,
}

impl Power {
    /// Power that stays.
    pub fn new() -> Power {
        Power::default()
    }

    /// Fails when so many more operations (from 1) have begun.
    pub fn fail_after(&self, operations: u64) {
        let at = self.state.operations.get() + operations;
        self.state.fail_at.set(Some(at));
    }

    /// Operations that have begun so far.
    pub fn operations(&self) -> u64 {
        self.state.operations.get()
    }

    /// Numbers of the operations that changed a disk's first sector, where formats have a header.
    pub fn header_changes(&self) -> Vec<u64> {
        self.state.marks.borrow().clone()
    }

    /// It failed.
    pub fn is_off(&self) -> bool {
        self.state.off.is_set()
    }

    /// Fails now.
    pub fn cut(&self) {
        self.state.off.set();
    }

    /// An operation begins.
    pub(super) fn count(&self) {
        let number = self.state.operations.get() + 1;
        self.state.operations.set(number);
        if self.state.fail_at.get() == Some(number) {
            self.cut();
        }
    }

    /// The operation that began last changes a disk's first sector.
    pub(super) fn mark(&self) {
        self.state.marks.borrow_mut().push(self.operations());
    }

    /// Runs a future to its end, or until power fails: then the future is dropped unfinished.
    pub async fn run<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        let mut failure = pin!(self.state.off.wait());
        poll_fn(|context| {
            if failure.as_mut().poll(context).is_ready() {
                return Poll::Ready(None);
            }
            future.as_mut().poll(context).map(Some)
        })
        .await
    }
}

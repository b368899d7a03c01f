//! Tasks: futures that the runtime polls, and the handles that wait for them.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::ready::{ReadyQueue, TaskId, TaskWaker};

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// All tasks of a runtime.
pub(super) struct TaskTable {
    slots: RefCell<Slab<Slot>>,
    generation: std::cell::Cell<u64>,
}

struct Slot {
    generation: u64,
    /// Taken out while it is polled.
    body: Option<Body>,
}

struct Body {
    future: LocalFuture,
    waker: Waker,
    flag: Arc<TaskWaker>,
}

impl TaskTable {
    pub(super) fn new() -> TaskTable {
        TaskTable {
            slots: RefCell::default(),
            generation: std::cell::Cell::new(1),
        }
    }

    /// Adds a task, ready to run.
    pub(super) fn insert(&self, future: LocalFuture, ready: &Arc<ReadyQueue>) -> TaskId {
        let generation = self.generation.get();
        self.generation.set(generation + 1);
        let mut slots = self.slots.borrow_mut();
        let id = TaskId {
            index: slots.vacant_key(),
            generation,
        };
        let flag = TaskWaker::new(id, ready);
        let waker = Waker::from(flag.clone());
        waker.wake_by_ref();
        let body = Some(Body {
            future,
            waker,
            flag,
        });
        slots.insert(Slot { generation, body });
        id
    }

    /// Polls a task once; a task that is gone is none to poll.
    pub(super) fn poll(&self, id: TaskId) {
        let Some(mut body) = self.take_body(id) else {
            return;
        };
        body.flag.unqueue();
        let mut context = Context::from_waker(&body.waker);
        let done = body.future.as_mut().poll(&mut context).is_ready();
        if done {
            self.remove(id);
        } else {
            self.put_back(id, body);
        }
    }

    fn take_body(&self, id: TaskId) -> Option<Body> {
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(id.index)?;
        (slot.generation == id.generation)
            .then(|| slot.body.take())
            .flatten()
    }

    /// Puts a polled task back, unless it was aborted meanwhile: then it is dropped here.
    fn put_back(&self, id: TaskId, body: Body) {
        let mut slots = self.slots.borrow_mut();
        match slots.get_mut(id.index) {
            Some(slot) if slot.generation == id.generation => slot.body = Some(body),
            _ => {
                drop(slots);
                drop(body);
            }
        }
    }

    /// Forgets a task and drops its future, unless the future is being polled now.
    pub(super) fn remove(&self, id: TaskId) {
        let mut slots = self.slots.borrow_mut();
        let matches = slots
            .get(id.index)
            .is_some_and(|slot| slot.generation == id.generation);
        let removed = matches.then(|| slots.remove(id.index));
        // The drop of a future may spawn or abort.
        drop(slots);
        drop(removed);
    }

    /// Drops every future.
    pub(super) fn clear(&self) {
        while let Some(slot) = self.take_any() {
            drop(slot);
        }
    }

    fn take_any(&self) -> Option<Slot> {
        let mut slots = self.slots.borrow_mut();
        let index = slots.iter().next().map(|(index, _)| index)?;
        Some(slots.remove(index))
    }

    /// Tasks that have not ended.
    pub(super) fn len(&self) -> usize {
        self.slots.borrow().len()
    }
}

/// A spawned task: a future of its result. Dropping this detaches the task, which runs on.
#[must_use = "dropping a Task detaches it; say `.detach()`"]
pub struct Task<T> {
    join: Rc<Join<T>>,
    table: Weak<TaskTable>,
    id: TaskId,
}

struct Join<T> {
    state: RefCell<JoinState<T>>,
}

struct JoinState<T> {
    result: Option<T>,
    waiter: Option<Waker>,
}

impl<T: 'static> Task<T> {
    pub(super) fn spawn(
        future: impl Future<Output = T> + 'static,
        table: &Rc<TaskTable>,
        ready: &Arc<ReadyQueue>,
    ) -> Task<T> {
        let state = RefCell::new(JoinState {
            result: None,
            waiter: None,
        });
        let join = Rc::new(Join { state });
        let result = join.clone();
        let body = Box::pin(async move { result.finish(future.await) });
        let id = table.insert(body, ready);
        Task {
            join,
            table: Rc::downgrade(table),
            id,
        }
    }
}

impl<T> Task<T> {
    /// Lets the task run on by itself.
    pub fn detach(self) {}

    /// Stops the task: its future is dropped now (or, when a task aborts itself, at its next
    /// await). I/O that it had started runs on in the ring.
    pub fn abort(self) {
        if let Some(table) = self.table.upgrade() {
            table.remove(self.id);
        }
    }

    /// The result is there: awaiting it does not wait.
    pub fn is_finished(&self) -> bool {
        self.join.state.borrow().result.is_some()
    }
}

impl<T> Join<T> {
    fn finish(&self, result: T) {
        let mut state = self.state.borrow_mut();
        state.result = Some(result);
        let waiter = state.waiter.take();
        drop(state);
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.join.state.borrow_mut();
        match state.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                state.waiter = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

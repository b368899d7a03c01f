//! Wakes tasks that wait for something to change.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::waiters::{WaiterId, Waiters};

/// A signal without memory, but for one stored wake-up: `notify_one` with nobody waiting lets the
/// next waiter pass at once.
pub struct Notify {
    state: RefCell<State>,
}

struct State {
    stored: bool,
    waiters: Waiters<()>,
    /// Woken by `notify_one`, and not polled since.
    chosen: Vec<WaiterId>,
}

impl Notify {
    /// Nobody waits, nothing is stored.
    pub const fn new() -> Notify {
        let state = State {
            stored: false,
            waiters: Waiters::new(),
            chosen: Vec::new(),
        };
        Notify {
            state: RefCell::new(state),
        }
    }

    /// Wakes the longest waiting task, or stores the wake-up.
    pub fn notify_one(&self) {
        let mut state = self.state.borrow_mut();
        match state.waiters.pop() {
            Some(waiter) => {
                state.chosen.push(waiter.id);
                drop(state);
                waiter.wake();
            }
            None => state.stored = true,
        }
    }

    /// Wakes every task that waits now; stores nothing.
    pub fn notify_all(&self) {
        let mut woken = self.state.borrow_mut().waiters.take();
        while let Some(waiter) = woken.pop() {
            waiter.wake();
        }
    }

    /// Waits for a wake-up; the future counts as waiting from its first poll on.
    pub fn notified(&self) -> Notified<'_> {
        Notified {
            notify: self,
            state: NotifiedState::New,
        }
    }
}

impl Default for Notify {
    fn default() -> Notify {
        Notify::new()
    }
}

/// Waits for a wake-up.
#[must_use = "a future does nothing unless awaited"]
pub struct Notified<'a> {
    notify: &'a Notify,
    state: NotifiedState,
}

#[derive(Clone, Copy)]
enum NotifiedState {
    New,
    Waiting(WaiterId),
    Done,
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let notify = self.notify;
        let mut state = notify.state.borrow_mut();
        match self.state {
            NotifiedState::New if std::mem::take(&mut state.stored) => {}
            NotifiedState::New => {
                let id = state.waiters.push((), context.waker());
                self.state = NotifiedState::Waiting(id);
                return Poll::Pending;
            }
            NotifiedState::Waiting(id) if state.waiters.update(id, context.waker()) => {
                return Poll::Pending;
            }
            NotifiedState::Waiting(id) => state.chosen.retain(|chosen| *chosen != id),
            NotifiedState::Done => {}
        }
        self.state = NotifiedState::Done;
        Poll::Ready(())
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        let NotifiedState::Waiting(id) = self.state else {
            return;
        };
        let mut state = self.notify.state.borrow_mut();
        let waited = state.waiters.remove(id).is_some();
        let before = state.chosen.len();
        state.chosen.retain(|chosen| *chosen != id);
        let unused = before != state.chosen.len();
        drop(state);
        if !waited && unused {
            // The wake-up was meant for one task, and this one did not use it.
            self.notify.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn a_dropped_waiter_passes_its_wake_up_on() {
        let runtime = Runtime::simulated(3).expect("runtime");
        let handle = runtime.handle();
        let notify = Rc::new(Notify::new());
        runtime.block_on(async {
            let wait = |notify: Rc<Notify>| async move { notify.notified().await };
            let first = handle.spawn(wait(notify.clone()));
            handle.sleep(std::time::Duration::from_millis(1)).await;
            let second = handle.spawn(wait(notify.clone()));
            handle.sleep(std::time::Duration::from_millis(1)).await;
            notify.notify_one();
            first.abort();
            second.await;
        });
    }

    #[test]
    fn one_wake_up_is_stored_and_all_are_woken() {
        let runtime = Runtime::simulated(3).expect("runtime");
        let handle = runtime.handle();
        let notify = Rc::new(Notify::new());
        runtime.block_on(async {
            notify.notify_one();
            notify.notify_one();
            notify.notified().await;
            let tasks: Vec<_> = (0..5)
                .map(|_| {
                    let notify = notify.clone();
                    handle.spawn(async move { notify.notified().await })
                })
                .collect();
            handle.sleep(std::time::Duration::from_millis(1)).await;
            notify.notify_all();
            for task in tasks {
                task.await;
            }
        });
    }
}

//! A queue of values from many tasks to one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use super::notify::Notify;
use super::semaphore::Semaphore;

struct Shared<T> {
    queue: RefCell<VecDeque<T>>,
    arrived: Notify,
    /// Room in a bounded queue.
    room: Option<Semaphore>,
    senders: Cell<usize>,
    receiver_gone: Cell<bool>,
}

/// A queue that holds at most `capacity` (not 0) values; senders wait for room.
pub fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    assert!(capacity > 0, "a queue without room");
    channel(Some(Semaphore::new(capacity)))
}

/// A queue without bound: for values whose number something else bounds.
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    channel(None)
}

fn channel<T>(room: Option<Semaphore>) -> (Sender<T>, Receiver<T>) {
    let shared = Rc::new(Shared {
        queue: RefCell::default(),
        arrived: Notify::new(),
        room,
        senders: Cell::new(1),
        receiver_gone: Cell::new(false),
    });
    let sender = Sender {
        shared: shared.clone(),
    };
    (sender, Receiver { shared })
}

/// Sends values; clones send to the same queue.
pub struct Sender<T> {
    shared: Rc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Waits for room and sends; the value comes back where the receiver is gone. Dropping the
    /// future while it waits sends nothing.
    pub async fn send(&self, value: T) -> Result<(), T> {
        if let Some(room) = &self.shared.room {
            room.acquire(1).await.forget();
        }
        self.put(value)
    }

    /// Sends if that needs no waiting; the value comes back where there is no room or no receiver.
    pub fn try_send(&self, value: T) -> Result<(), T> {
        if let Some(room) = &self.shared.room {
            match room.try_acquire(1) {
                Some(permit) => permit.forget(),
                None => return Err(value),
            }
        }
        self.put(value)
    }

    fn put(&self, value: T) -> Result<(), T> {
        if self.shared.receiver_gone.get() {
            self.shared.make_room();
            return Err(value);
        }
        self.shared.queue.borrow_mut().push_back(value);
        self.shared.arrived.notify_one();
        Ok(())
    }
}

impl<T> Shared<T> {
    fn make_room(&self) {
        if let Some(room) = &self.room {
            room.release(1);
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.shared.senders.set(self.shared.senders.get() + 1);
        Sender {
            shared: self.shared.clone(),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.shared.senders.set(self.shared.senders.get() - 1);
        if self.shared.senders.get() == 0 {
            self.shared.arrived.notify_one();
        }
    }
}

/// Receives values.
pub struct Receiver<T> {
    shared: Rc<Shared<T>>,
}

impl<T> Receiver<T> {
    /// Waits for the next value; `None` when every sender is gone and the queue empty. Dropping the
    /// future loses no value.
    pub async fn recv(&mut self) -> Option<T> {
        loop {
            if let Some(value) = self.try_recv() {
                return Some(value);
            }
            if self.shared.senders.get() == 0 {
                return None;
            }
            self.shared.arrived.notified().await;
        }
    }

    /// The next value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        let value = self.shared.queue.borrow_mut().pop_front()?;
        self.shared.make_room();
        Some(value)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.receiver_gone.set(true);
        while let Some(value) = self.try_recv() {
            drop(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn a_bounded_queue_makes_senders_wait() {
        let runtime = Runtime::simulated(11).expect("runtime");
        let handle = runtime.handle();
        runtime.block_on(async {
            let (sender, mut receiver) = bounded(2);
            let sending = handle.spawn(async move {
                for number in 0..100 {
                    sender.send(number).await.expect("receiver lives");
                }
            });
            handle.sleep(Duration::from_secs(1)).await;
            assert!(!sending.is_finished());
            let mut received = Vec::new();
            while let Some(number) = receiver.recv().await {
                received.push(number);
            }
            assert_eq!(received, (0..100).collect::<Vec<_>>());
        });
    }

    #[test]
    fn a_dropped_receive_loses_nothing() {
        let runtime = Runtime::simulated(11).expect("runtime");
        let handle = runtime.handle();
        runtime.block_on(async {
            let (sender, mut receiver) = unbounded();
            for number in 0..50 {
                let limit = handle.timeout(Duration::from_nanos(number), receiver.recv());
                assert!(limit.await.is_err());
                sender.try_send(number).expect("receiver lives");
                assert_eq!(receiver.recv().await, Some(number));
            }
        });
    }

    #[test]
    fn senders_that_wait_learn_that_the_receiver_is_gone() {
        let runtime = Runtime::simulated(11).expect("runtime");
        let handle = runtime.handle();
        runtime.block_on(async {
            let (sender, receiver) = bounded(1);
            sender.send(1).await.expect("room");
            let waiting = handle.spawn(async move { sender.send(2).await });
            handle.yield_now().await;
            drop(receiver);
            assert_eq!(waiting.await, Err(2));
        });
    }
}

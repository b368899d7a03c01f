//! One value from one task to another.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

struct Shared<T> {
    value: Option<T>,
    receiver: Option<Waker>,
    sender_gone: bool,
    receiver_gone: bool,
}

/// A connected pair.
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Rc::new(RefCell::new(Shared {
        value: None,
        receiver: None,
        sender_gone: false,
        receiver_gone: false,
    }));
    let sender = Sender {
        shared: shared.clone(),
    };
    (sender, Receiver { shared })
}

/// Sends the value.
pub struct Sender<T> {
    shared: Rc<RefCell<Shared<T>>>,
}

impl<T> Sender<T> {
    /// Sends, or returns the value where the receiver is gone.
    pub fn send(self, value: T) -> Result<(), T> {
        let mut shared = self.shared.borrow_mut();
        if shared.receiver_gone {
            return Err(value);
        }
        shared.value = Some(value);
        Ok(())
    }

    /// Nobody waits for the value any more.
    pub fn is_closed(&self) -> bool {
        self.shared.borrow().receiver_gone
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.sender_gone = true;
        let waker = shared.receiver.take();
        drop(shared);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Waits for the value; `None` where the sender was dropped without sending.
#[must_use = "a future does nothing unless awaited"]
pub struct Receiver<T> {
    shared: Rc<RefCell<Shared<T>>>,
}

impl<T> Future for Receiver<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut shared = self.shared.borrow_mut();
        if let Some(value) = shared.value.take() {
            return Poll::Ready(Some(value));
        }
        if shared.sender_gone {
            return Poll::Ready(None);
        }
        shared.receiver = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.receiver_gone = true;
        let unread = shared.value.take();
        drop(shared);
        drop(unread);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn the_value_arrives_and_a_dropped_sender_is_noticed() {
        let runtime = Runtime::simulated(0).expect("runtime");
        let handle = runtime.handle();
        runtime.block_on(async {
            let (sender, receiver) = channel();
            handle
                .spawn(async move { sender.send(5).expect("receiver waits") })
                .detach();
            assert_eq!(receiver.await, Some(5));
            let (sender, receiver) = channel::<u8>();
            handle.spawn(async move { drop(sender) }).detach();
            assert_eq!(receiver.await, None);
        });
    }

    #[test]
    fn sending_to_nobody_returns_the_value() {
        let (sender, receiver) = channel();
        drop(receiver);
        assert_eq!(sender.send(9), Err(9));
    }
}

//! A fair async mutex.

use std::cell::{RefCell, RefMut};
use std::ops::{Deref, DerefMut};

use super::semaphore::{Permit, Semaphore};

/// A value that one task at a time may use, also across awaits.
pub struct Mutex<T> {
    gate: Semaphore,
    value: RefCell<T>,
}

impl<T> Mutex<T> {
    /// An unlocked value.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex {
            gate: Semaphore::new(1),
            value: RefCell::new(value),
        }
    }

    /// Waits for the value, first come, first served.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        let permit = self.gate.acquire(1).await;
        self.guard(permit)
    }

    /// The value, if that needs no waiting.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let permit = self.gate.try_acquire(1)?;
        Some(self.guard(permit))
    }

    /// The value, when nobody else can reach it.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }

    fn guard<'a>(&'a self, permit: Permit<'a>) -> MutexGuard<'a, T> {
        MutexGuard {
            value: self.value.borrow_mut(),
            _permit: permit,
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Mutex<T> {
        Mutex::new(T::default())
    }
}

/// The locked value. Fields drop in order: the borrow ends before the next task may take it.
#[must_use = "the mutex is unlocked when this is dropped"]
pub struct MutexGuard<'a, T> {
    value: RefMut<'a, T>,
    _permit: Permit<'a>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn a_waiter_that_gives_up_does_not_keep_the_lock() {
        let runtime = Runtime::simulated(1).expect("runtime");
        let handle = runtime.handle();
        let mutex = Rc::new(Mutex::new(0));
        runtime.block_on(async {
            let guard = mutex.lock().await;
            let waiting = handle.spawn({
                let mutex = mutex.clone();
                async move { *mutex.lock().await += 1 }
            });
            handle.yield_now().await;
            drop(guard);
            // The lock is granted to the task, which is aborted before it could take it.
            waiting.abort();
            assert_eq!(*mutex.lock().await, 0);
        });
    }

    #[test]
    fn the_lock_is_fair() {
        let runtime = Runtime::new(&Default::default()).expect("runtime");
        let handle = runtime.handle();
        let mutex = Rc::new(Mutex::new(Vec::new()));
        runtime.block_on(async {
            let guard = mutex.lock().await;
            let tasks: Vec<_> = (0..10)
                .map(|number| {
                    let mutex = mutex.clone();
                    handle.spawn(async move { mutex.lock().await.push(number) })
                })
                .collect();
            handle.yield_now().await;
            drop(guard);
            assert!(
                mutex.try_lock().is_none(),
                "the lock is promised to a waiter"
            );
            for task in tasks {
                task.await;
            }
            assert_eq!(*mutex.lock().await, (0..10).collect::<Vec<_>>());
        });
    }
}

//! A fair async read-write lock.

use std::cell::{Ref, RefCell, RefMut};
use std::ops::{Deref, DerefMut};

use super::semaphore::{Permit, Semaphore};

/// What a writer takes: more than there can be readers.
const ALL: usize = usize::MAX >> 1;

/// A value that many tasks may read or one may write. A waiting writer is not overtaken by readers
/// that come later.
pub struct RwLock<T> {
    gate: Semaphore,
    value: RefCell<T>,
}

impl<T> RwLock<T> {
    /// An unlocked value.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock {
            gate: Semaphore::new(ALL),
            value: RefCell::new(value),
        }
    }

    /// Waits to read.
    pub async fn read(&self) -> ReadGuard<'_, T> {
        let permit = self.gate.acquire(1).await;
        ReadGuard {
            value: self.value.borrow(),
            _permit: permit,
        }
    }

    /// Waits to write.
    pub async fn write(&self) -> WriteGuard<'_, T> {
        let permit = self.gate.acquire(ALL).await;
        WriteGuard {
            value: self.value.borrow_mut(),
            _permit: permit,
        }
    }

    /// Reads, if that needs no waiting.
    pub fn try_read(&self) -> Option<ReadGuard<'_, T>> {
        let permit = self.gate.try_acquire(1)?;
        Some(ReadGuard {
            value: self.value.borrow(),
            _permit: permit,
        })
    }

    /// Writes, if that needs no waiting.
    pub fn try_write(&self) -> Option<WriteGuard<'_, T>> {
        let permit = self.gate.try_acquire(ALL)?;
        Some(WriteGuard {
            value: self.value.borrow_mut(),
            _permit: permit,
        })
    }
}

/// The value, to read.
#[must_use = "the lock is released when this is dropped"]
pub struct ReadGuard<'a, T> {
    value: Ref<'a, T>,
    _permit: Permit<'a>,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// The value, to write.
#[must_use = "the lock is released when this is dropped"]
pub struct WriteGuard<'a, T> {
    value: RefMut<'a, T>,
    _permit: Permit<'a>,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
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
    fn readers_share_and_a_waiting_writer_stops_new_readers() {
        let runtime = Runtime::simulated(7).expect("runtime");
        let handle = runtime.handle();
        let lock = Rc::new(RwLock::new(1));
        runtime.block_on(async {
            let first = lock.read().await;
            let second = lock.read().await;
            let writer = handle.spawn({
                let lock = lock.clone();
                async move { *lock.write().await = 2 }
            });
            handle.yield_now().await;
            assert!(lock.try_read().is_none());
            drop((first, second));
            writer.await;
            assert_eq!(*lock.read().await, 2);
        });
    }

    #[test]
    fn a_writer_that_gives_up_lets_readers_pass() {
        let runtime = Runtime::simulated(7).expect("runtime");
        let handle = runtime.handle();
        let lock = Rc::new(RwLock::new(()));
        runtime.block_on(async {
            let reader = lock.read().await;
            let writer = handle.spawn({
                let lock = lock.clone();
                async move { drop(lock.write().await) }
            });
            handle.yield_now().await;
            let late = handle.spawn({
                let lock = lock.clone();
                async move { drop(lock.read().await) }
            });
            handle.yield_now().await;
            writer.abort();
            late.await;
            drop(reader);
        });
    }
}

//! Async locks, events and channels for the tasks of one thread.
//!
//! All are fair (first come, first served) and cancel-safe: dropping a future that waits neither
//! loses a wake-up nor leaks a lock, and a received value is never lost. They work without a ring.
//! The crate's tasks use these and never hold a `RefCell` borrow or a `std` lock over an await.

mod event;
pub mod mpsc;
mod mutex;
mod notify;
pub mod oneshot;
mod rwlock;
mod semaphore;
mod waiters;

pub use event::Event;
pub use mutex::{Mutex, MutexGuard};
pub use notify::{Notified, Notify};
pub use rwlock::{ReadGuard, RwLock, WriteGuard};
pub use semaphore::{Acquire, OwnedPermit, Permit, Semaphore};

//! A condition that tasks wait for.

use std::cell::Cell;

use super::notify::Notify;

/// Set or not; who waits passes while it is set.
#[derive(Default)]
pub struct Event {
    set: Cell<bool>,
    changed: Notify,
}

impl Event {
    /// Not set.
    pub const fn new() -> Event {
        Event {
            set: Cell::new(false),
            changed: Notify::new(),
        }
    }

    /// Sets it and wakes everyone who waits.
    pub fn set(&self) {
        self.set.set(true);
        self.changed.notify_all();
    }

    /// From now on tasks wait.
    pub fn clear(&self) {
        self.set.set(false);
    }

    /// Is set now.
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    /// Waits until it is set.
    pub async fn wait(&self) {
        while !self.set.get() {
            self.changed.notified().await;
        }
    }
}

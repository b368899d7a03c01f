//! A job's speed limit: what was copied is paid for afterwards, by waiting.

use std::cell::Cell;
use std::time::Duration;

use crate::runtime::Instant;

/// Debts of less than this are let pass, so that a fast job is not held up by its own timer.
const SLICE: Duration = Duration::from_millis(100);

/// How many bytes a second; 0 is no limit.
#[derive(Default)]
pub(super) struct RateLimit {
    speed: Cell<u64>,
    /// Bytes done that were not paid for when `settled_at` was.
    owed: Cell<f64>,
    settled_at: Cell<Instant>,
}

impl RateLimit {
    /// Bytes a second; 0 is no limit.
    pub(super) fn speed(&self) -> u64 {
        self.speed.get()
    }

    /// Another limit from now on; what is owed is paid at the new speed.
    pub(super) fn set_speed(&self, speed: u64, now: Instant) {
        self.settle(now);
        self.speed.set(speed);
    }

    /// This many bytes were done at `now`.
    pub(super) fn account(&self, bytes: u64, now: Instant) {
        self.settle(now);
        if self.speed.get() > 0 {
            self.owed.set(self.owed.get() + bytes as f64);
        }
    }

    /// How long to wait before more is done; `None`: go on now.
    pub(super) fn delay(&self, now: Instant) -> Option<Duration> {
        self.settle(now);
        if self.speed.get() == 0 {
            return None;
        }
        let seconds = self.owed.get() / self.speed.get() as f64;
        // A byte a second makes a debt of ages; whoever waits looks again when the limit changes.
        let debt = Duration::from_secs_f64(seconds.min(1e6));
        (debt > SLICE).then_some(debt)
    }

    fn settle(&self, now: Instant) {
        let passed = now.saturating_since(self.settled_at.replace(now));
        let paid = passed.as_secs_f64() * self.speed.get() as f64;
        let owed = if self.speed.get() == 0 {
            0.0
        } else {
            (self.owed.get() - paid).max(0.0)
        };
        self.owed.set(owed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::default() + Duration::from_millis(milliseconds)
    }

    #[test]
    fn work_is_paid_for_afterwards() {
        let limit = RateLimit::default();
        limit.set_speed(1000, at(0));
        assert_eq!(limit.delay(at(0)), None, "the first piece goes at once");
        limit.account(2000, at(0));
        assert_eq!(limit.delay(at(500)), Some(Duration::from_millis(1500)));
        assert_eq!(limit.delay(at(1950)), None, "less than a slice is let pass");
    }

    #[test]
    fn a_new_limit_holds_for_what_is_owed() {
        let limit = RateLimit::default();
        limit.set_speed(1000, at(0));
        limit.account(2000, at(0));
        limit.set_speed(2000, at(1000));
        assert_eq!(limit.delay(at(1000)), Some(Duration::from_millis(500)));
        limit.set_speed(0, at(1000));
        assert_eq!(limit.delay(at(1000)), None);
        limit.set_speed(1, at(1000));
        assert_eq!(limit.delay(at(1000)), None, "debts end with the limit");
    }
}

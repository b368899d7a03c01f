//! Leaky buckets: what was let through fills them, time empties them, and an overfull one makes wait.

use std::time::Duration;

use crate::runtime::clock::Instant;

use super::limits::{BYTES, REQUESTS, ThrottleLimits};

/// Without bursts a bucket holds what flows out in this part of a second.
const PART: f64 = 10.0;
/// Nobody waits longer at a time before looking again.
const LONGEST: f64 = 1e9;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) fn index(self) -> usize {
        match self {
            Direction::Read => 0,
            Direction::Write => 1,
        }
    }
}

/// How full the buckets of a group are.
pub(super) struct Buckets {
    limits: ThrottleLimits,
    levels: [f64; 6],
    /// Empties at the burst rate: a burst is no faster than that.
    bursts: [f64; 6],
    looked: Instant,
}

impl Buckets {
    pub(super) fn new(limits: ThrottleLimits, now: Instant) -> Buckets {
        Buckets {
            limits,
            levels: [0.0; 6],
            bursts: [0.0; 6],
            looked: now,
        }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limits
    }

    /// How long the next request must wait.
    pub(super) fn wait(&mut self, direction: Direction, now: Instant) -> Duration {
        self.leak(now);
        let seconds = concerned(direction)
            .map(|index| self.seconds(index))
            .fold(0.0, f64::max);
        if seconds <= 0.0 {
            return Duration::ZERO;
        }
        // Rounded up, so that the time is over when the timer says so.
        Duration::from_secs_f64(seconds.min(LONGEST)) + Duration::from_nanos(1)
    }

    /// A request of so many bytes was let through.
    pub(super) fn fill(&mut self, direction: Direction, bytes: u64, now: Instant) {
        self.leak(now);
        let size = self.limits.iops_size as f64;
        let bytes = bytes as f64;
        let requests = if size > 0.0 && bytes > size {
            bytes / size
        } else {
            1.0
        };
        for index in concerned(direction) {
            let units = if BYTES.contains(&index) {
                bytes
            } else {
                requests
            };
            self.levels[index] += units;
            self.bursts[index] += units;
        }
    }

    fn leak(&mut self, now: Instant) {
        let passed = now.saturating_since(self.looked).as_secs_f64();
        self.looked = now;
        for (index, rate) in self.limits.rates.iter().enumerate() {
            let leaked = |level: f64, rate: i64| (level - passed * rate as f64).max(0.0);
            self.levels[index] = leaked(self.levels[index], rate.average);
            self.bursts[index] = leaked(self.bursts[index], rate.max);
        }
    }

    fn seconds(&self, index: usize) -> f64 {
        let rate = self.limits.rates[index];
        let (average, max) = (rate.average as f64, rate.max as f64);
        if rate.average == 0 {
            return 0.0;
        }
        if rate.max == 0 {
            return (self.levels[index] - average / PART) / average;
        }
        let whole = (self.levels[index] - max * rate.max_length as f64) / average;
        if rate.max_length > 1 {
            whole.max((self.bursts[index] - max / PART) / max)
        } else {
            whole
        }
    }
}

/// The limits that a direction falls under.
fn concerned(direction: Direction) -> impl Iterator<Item = usize> {
    let own = direction.index() + 1;
    [BYTES[0], BYTES[own], REQUESTS[0], REQUESTS[own]].into_iter()
}

//! How long the loop looks for events before it sleeps.
//!
//! A thread that sleeps must be woken, which takes the kernel longer than many a request. So the loop
//! looks at the rings for a while first, without a system call. It learns how long that has to be: as long
//! as events came apart of late, and not at all where they come further apart than it may look.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// How many wake-ups the default may cost: as QEMU's does on hardware, where one takes some four
/// microseconds.
const WAKE_UPS: u64 = 8;
/// Whoever wants to poll for longer than this has to say so.
const LONGEST_DEFAULT_NS: u64 = 1_000_000;
/// By which the cost of a wake-up is measured.
const ROUND_TRIPS: usize = 15;
/// What the polling time grows to at first where it grows by a factor.
const FIRST_NS: u64 = 4000;

/// Bounds of polling; the properties of QEMU's `iothread` objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollPolicy {
    /// Nanoseconds for which to look for events at most; 0: never.
    pub max_ns: u64,
    /// Factor by which the polling time grows when an event came too late for it; 0: it becomes half
    /// as much again as would have been enough.
    pub grow: u64,
    /// Divisor by which it shrinks when an event came later than the loop may look; 0: to nothing.
    pub shrink: u64,
}

impl Default for PollPolicy {
    /// QEMU's.
    fn default() -> PollPolicy {
        PollPolicy {
            max_ns: 32768,
            grow: 0,
            shrink: 0,
        }
    }
}

impl PollPolicy {
    /// Sleep at once.
    pub const NEVER: PollPolicy = PollPolicy {
        max_ns: 0,
        grow: 0,
        shrink: 0,
    };

    /// For the machine that this runs on: QEMU's default, or more where waking a thread takes longer
    /// than on the machines that it was chosen for (under emulation, some twenty times). Nothing where
    /// there is one processor, which whoever is waited for needs.
    pub fn for_this_machine() -> PollPolicy {
        let Some(processors) = two_processors() else {
            return PollPolicy::NEVER;
        };
        let wake_up_ns = wake_up_ns(processors).unwrap_or(0);
        let default = PollPolicy::default();
        let max_ns = wake_up_ns.saturating_mul(WAKE_UPS);
        let max_ns = max_ns.clamp(default.max_ns, LONGEST_DEFAULT_NS);
        tracing::debug!(wake_up_ns, max_ns, "how long to poll");
        PollPolicy { max_ns, ..default }
    }

    fn grown(&self, time_ns: u64, waited_ns: u64) -> u64 {
        let grown = match self.grow {
            0 => waited_ns.saturating_add(waited_ns / 2),
            _ if time_ns == 0 => FIRST_NS,
            factor => time_ns.saturating_mul(factor),
        };
        grown.min(self.max_ns)
    }

    fn shrunk(&self, time_ns: u64) -> u64 {
        time_ns.checked_div(self.shrink).unwrap_or(0)
    }
}

/// Two processors on which this thread may run.
fn two_processors() -> Option<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut allowed = (0..CpuSet::count()).filter(|number| allowed.is_set(*number) == Ok(true));
    Some([allowed.next()?, allowed.next()?])
}

/// Nanoseconds from one thread's waking another one on another processor until that runs; `None`
/// where no thread can be had.
fn wake_up_ns(processors: [usize; 2]) -> Option<u64> {
    let exchange = Arc::new(Exchange::default());
    let [first, second] = [0, 1].map(|side| {
        let exchange = exchange.clone();
        thread::Builder::new().spawn(move || {
            run_on(processors[side]);
            exchange.play(side)
        })
    });
    let (Ok(first), Ok(second)) = (first, second) else {
        // One alone would wait for ever.
        exchange.end();
        return None;
    };
    let mut trips = first.join().ok()?;
    second.join().ok()?;
    trips.sort_unstable();
    let median = trips.get(trips.len() / 2)?;
    u64::try_from(median.as_nanos() / 2).ok()
}

/// Two threads that wake each other in turn.
#[derive(Default)]
struct Exchange {
    turn: Mutex<usize>,
    passed: Condvar,
}

impl Exchange {
    /// Takes this side's turns; how long each took from the last one on.
    fn play(&self, side: usize) -> Vec<Duration> {
        let mut trips = Vec::with_capacity(ROUND_TRIPS);
        let mut turn = self.lock();
        let mut began = Instant::now();
        while *turn < 2 * ROUND_TRIPS {
            if *turn % 2 == side {
                trips.push(began.elapsed());
                began = Instant::now();
                *turn += 1;
                self.passed.notify_one();
            } else {
                turn = self
                    .passed
                    .wait(turn)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        trips
    }

    fn end(&self) {
        *self.lock() = usize::MAX;
        self.passed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the calling thread on one processor; where that is not allowed, it runs anywhere.
fn run_on(processor: usize) {
    let mut set = CpuSet::new();
    if set.set(processor).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// The polling time that was learnt.
pub(super) struct Polling {
    default: PollPolicy,
    policy: Cell<PollPolicy>,
    time_ns: Cell<u64>,
}

impl Polling {
    pub(super) fn new(default: PollPolicy) -> Polling {
        Polling {
            default,
            policy: Cell::new(default),
            time_ns: Cell::new(0),
        }
    }

    /// Other bounds, or the first ones again.
    pub(super) fn set_policy(&self, policy: Option<PollPolicy>) {
        let policy = policy.unwrap_or(self.default);
        self.policy.set(policy);
        self.time_ns.set(self.time_ns.get().min(policy.max_ns));
    }

    /// The loop may poll, so that waits are to be timed.
    pub(super) fn is_enabled(&self) -> bool {
        self.policy.get().max_ns > 0
    }

    /// How long to look for events now.
    pub(super) fn time(&self) -> Duration {
        Duration::from_nanos(self.time_ns.get())
    }

    /// The loop had nothing to do for `waited`, polling and asleep.
    pub(super) fn learn(&self, waited: Duration) {
        let waited_ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        let policy = self.policy.get();
        let time_ns = self.time_ns.get();
        if waited_ns > policy.max_ns {
            self.time_ns.set(policy.shrunk(time_ns));
        } else if waited_ns > time_ns {
            self.time_ns.set(policy.grown(time_ns, waited_ns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polling(max_ns: u64, grow: u64, shrink: u64) -> Polling {
        Polling::new(PollPolicy {
            max_ns,
            grow,
            shrink,
        })
    }

    /// What is learnt from waits of so many nanoseconds.
    fn learnt<const N: usize>(polling: &Polling, waits: [u64; N]) -> [u64; N] {
        waits.map(|wait| {
            polling.learn(Duration::from_nanos(wait));
            polling.time_ns.get()
        })
    }

    #[test]
    fn one_wait_teaches_how_long_to_poll_and_a_long_one_to_sleep() {
        let polling = polling(32768, 0, 0);
        let waits = [10_000, 12_000, 16_000, 30_000, 40_000, 40_000];
        let times = [15_000, 15_000, 24_000, 32_768, 0, 0];
        assert_eq!(learnt(&polling, waits), times);
    }

    #[test]
    fn factor_and_divisor_are_those_of_the_policy() {
        let polling = polling(30_000, 3, 2);
        let waits = [20_000, 20_000, 20_000, 29_000, 90_000, 90_000];
        let times = [4_000, 12_000, 30_000, 30_000, 15_000, 7_500];
        assert_eq!(learnt(&polling, waits), times);
    }

    #[test]
    fn a_new_bound_holds_at_once_and_none_ends_polling() {
        let polling = polling(32768, 0, 0);
        assert_eq!(learnt(&polling, [20_000]), [30_000]);
        polling.set_policy(Some(PollPolicy {
            max_ns: 1000,
            ..PollPolicy::default()
        }));
        assert_eq!(polling.time_ns.get(), 1000);
        polling.set_policy(Some(PollPolicy::NEVER));
        assert!(!polling.is_enabled());
        assert_eq!(learnt(&polling, [1, 0]), [0, 0]);
        polling.set_policy(None);
        assert_eq!(learnt(&polling, [20_000]), [30_000]);
    }

    #[test]
    fn the_default_is_between_its_bounds() {
        let max_ns = PollPolicy::for_this_machine().max_ns;
        let allowed = PollPolicy::default().max_ns..=LONGEST_DEFAULT_NS;
        assert!(max_ns == 0 || allowed.contains(&max_ns), "{max_ns}");
        if let Some(processors) = two_processors() {
            assert!(wake_up_ns(processors).is_some_and(|cost| cost > 0));
        }
    }
}

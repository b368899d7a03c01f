//! The loop: run what is ready, enter the kernel once, hand over completions.

use std::cell::Cell;
use std::future::Future;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nix::poll::PollFlags;

use super::Config;
use super::blocking::{Pool, Priority};
use super::clock::{Clock, Instant, Timers};
use super::handle::{Core, Handle};
use super::polling::{PollPolicy, Polling};
use super::ready::{ReadyQueue, TaskId, TaskWaker};
use super::ring::{Op, Ring, RingFile};
use super::task::TaskTable;
use crate::error::{Error, Result};

/// Polls between two looks at the ring, so that ready tasks cannot starve completions.
const MOST_POLLS: usize = 256;

/// Looks at the rings between two looks at the clock.
const LOOKS_PER_TIME: usize = 32;

/// The runtime of one thread. Dropping it drops all tasks, then waits until the kernel has let go
/// of the buffers of I/O in flight.
pub struct Runtime {
    handle: Handle,
    driver: Driver,
    running: Cell<bool>,
}

/// What moves the runtime when no task is ready.
enum Driver {
    Ring(RingDriver),
    Simulated,
}

impl Runtime {
    /// A runtime with a ring, owned by the calling thread. Fails with a message that says what to
    /// do where the kernel has no io_uring or it is disabled.
    pub fn new(config: &Config) -> Result<Runtime> {
        let ring = Ring::new(config)?;
        let ready = Arc::new(ReadyQueue::new()?);
        let driver = Driver::Ring(RingDriver::new(&ring, &ready)?);
        let core = Core {
            ready,
            tasks: Rc::new(TaskTable::new()),
            timers: Timers::default(),
            clock: Clock::real(),
            ring: Some(ring),
            pool: Pool::new(config.blocking_threads, Priority::Usual),
            background: Pool::new(config.background_threads, Priority::Low),
            polling: Polling::new(config.polling),
            random: Cell::new(config.seed),
        };
        Ok(Runtime::from_parts(core, driver))
    }

    /// A runtime without ring: time is virtual and jumps to the next timer when nothing is ready;
    /// among ready tasks the seed picks. Fails only where no eventfd can be had.
    pub fn simulated(seed: u64) -> Result<Runtime> {
        let core = Core {
            ready: Arc::new(ReadyQueue::new()?),
            tasks: Rc::new(TaskTable::new()),
            timers: Timers::default(),
            clock: Clock::simulated(),
            ring: None,
            pool: Pool::new(1, Priority::Usual),
            background: Pool::new(1, Priority::Low),
            polling: Polling::new(PollPolicy::NEVER),
            random: Cell::new(seed),
        };
        Ok(Runtime::from_parts(core, Driver::Simulated))
    }

    fn from_parts(core: Core, driver: Driver) -> Runtime {
        Runtime {
            handle: Handle {
                core: Rc::new(core),
            },
            driver,
            running: Cell::new(false),
        }
    }

    /// A reference for code on this thread.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs the loop until `future` is ready. Other tasks run meanwhile and stay when it ends. In a
    /// simulation nobody can wake a task from outside, so nothing ready and no timer is a bug: it
    /// asserts.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        assert!(!self.running.replace(true), "block_on inside block_on");
        let mut future = pin!(future);
        let main = TaskWaker::new(TaskId::MAIN, &self.handle.core.ready);
        let waker = Waker::from(main.clone());
        waker.wake_by_ref();
        loop {
            if let Poll::Ready(output) = self.run_ready(future.as_mut(), &main, &waker) {
                self.running.set(false);
                return output;
            }
            self.turn();
        }
    }

    /// Polls ready tasks, at most a bounded number.
    fn run_ready<F: Future>(
        &self,
        mut future: Pin<&mut F>,
        main: &TaskWaker,
        waker: &Waker,
    ) -> Poll<F::Output> {
        for _ in 0..MOST_POLLS {
            let Some(id) = self.next_ready() else { break };
            if id != TaskId::MAIN {
                self.handle.core.tasks.poll(id);
                continue;
            }
            main.unqueue();
            let polled = future.as_mut().poll(&mut Context::from_waker(waker));
            if polled.is_ready() {
                return polled;
            }
        }
        Poll::Pending
    }

    fn next_ready(&self) -> Option<TaskId> {
        let ready = &self.handle.core.ready;
        match self.driver {
            Driver::Ring(_) => ready.pop(),
            Driver::Simulated => {
                ready.pop_drawn(|count| self.handle.random_below(count as u64) as usize)
            }
        }
    }

    /// Lets time, the kernel and other threads make tasks ready.
    fn turn(&self) {
        match &self.driver {
            Driver::Ring(driver) => self.turn_ring(driver),
            Driver::Simulated => self.turn_simulated(),
        }
    }

    fn turn_ring(&self, driver: &RingDriver) {
        let core = &self.handle.core;
        let ring = self.handle.ring();
        core.timers.fire_if_any(&core.clock);
        ring.refill();
        if core.ready.len() > 0 || ring.has_backlog() {
            ring.flush();
        } else {
            self.wait(ring);
        }
        ring.reap();
        if core.ready.is_notified() && driver.was_woken() {
            self.take_foreign();
        }
        core.timers.fire_if_any(&core.clock);
    }

    /// Submits what is queued, or waits for an event: looking for one first, then asleep.
    fn wait(&self, ring: &Ring) {
        let polling = &self.handle.core.polling;
        if !polling.is_enabled() {
            return ring.enter(1, self.until_timer());
        }
        let time = polling.time();
        if !time.is_zero() && ring.needs_enter() {
            return ring.enter(0, None);
        }
        let began = self.handle.now();
        if self.sees_event(ring, began + time) {
            ring.flush();
        } else {
            ring.enter(1, self.until_timer());
        }
        polling.learn(self.handle.now() - began);
    }

    /// Looks for an event without a system call, until `end` or until a timer is due.
    fn sees_event(&self, ring: &Ring, end: Instant) -> bool {
        let core = &self.handle.core;
        let end = core.timers.next_deadline().map_or(end, |due| due.min(end));
        while core.clock.now() < end {
            for _ in 0..LOOKS_PER_TIME {
                if ring.has_news() || core.ready.is_notified() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }

    /// How long until the next timer is due.
    fn until_timer(&self) -> Option<Duration> {
        let core = &self.handle.core;
        let deadline = core.timers.next_deadline()?;
        Some(deadline.saturating_since(core.clock.now()))
    }

    fn turn_simulated(&self) {
        let core = &self.handle.core;
        self.take_foreign();
        if core.ready.len() > 0 {
            return;
        }
        let Some(deadline) = core.timers.next_deadline() else {
            panic!(
                "deadlock in simulation: no task is ready, no timer set, {} tasks left",
                core.tasks.len()
            );
        };
        core.clock.advance_to(deadline);
        core.timers.fire(core.clock.now());
    }

    fn take_foreign(&self) {
        for job in self.handle.core.ready.take_foreign() {
            job(&self.handle);
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let core = &self.handle.core;
        core.tasks.clear();
        core.timers.clear();
        self.driver = Driver::Simulated;
        if let Some(ring) = &core.ring {
            ring.shut_down();
        }
        core.ready.close();
    }
}

/// Notices wake-ups from other threads: a poll of the eventfd that is always in flight.
struct RingDriver {
    ring: Ring,
    event: Rc<RingFile>,
    poll: Cell<Option<Op<Result<usize>>>>,
}

impl RingDriver {
    fn new(ring: &Ring, ready: &ReadyQueue) -> Result<RingDriver> {
        let event = ready
            .event()
            .try_clone_to_owned()
            .map_err(|error| Error::from(error).context("Could not duplicate an eventfd"))?;
        let event = ring.file(event);
        let poll = Cell::new(Some(ring.poll_add(&event, PollFlags::POLLIN)));
        Ok(RingDriver {
            ring: ring.clone(),
            event,
            poll,
        })
    }

    /// The eventfd was written since the last call. Asked only when somebody says that he writes it.
    fn was_woken(&self) -> bool {
        let Some(mut poll) = self.poll.take() else {
            unreachable!("the eventfd is always polled")
        };
        let mut context = Context::from_waker(Waker::noop());
        match Pin::new(&mut poll).poll(&mut context) {
            Poll::Pending => {
                self.poll.set(Some(poll));
                false
            }
            Poll::Ready(outcome) => {
                if let Err(error) = outcome {
                    panic!("the eventfd cannot be polled: {error}");
                }
                self.rearm();
                true
            }
        }
    }

    /// Empties the eventfd, which is known to be readable, and polls it again.
    fn rearm(&self) {
        let mut count = [0; 8];
        let _ = nix::unistd::read(self.event.as_fd(), &mut count);
        let poll = self.ring.poll_add(&self.event, PollFlags::POLLIN);
        self.poll.set(Some(poll));
    }
}

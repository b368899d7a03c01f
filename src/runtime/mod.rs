//! One I/O thread: one io_uring and one executor for futures that never leave the thread.
//!
//! [`Runtime`] is owned by the thread and runs its loop; [`Handle`] is what everything else on the
//! thread holds, passed explicitly; [`Remote`] is what other threads hold. [`Runtime::simulated`]
//! has no ring: its clock is virtual and its order of tasks drawn from a seed, so that a failing
//! run is its seed. This is not a general async runtime: no thread pool for futures, no work
//! stealing, no global state.
//!
//! Invariants:
//! - Tasks run on the thread that owns the runtime, and only there.
//! - A wake-up from the own thread takes no lock; one from another thread is never lost.
//! - One io_uring_enter per turn of the loop.

mod blocking;
pub mod clock;
mod executor;
mod handle;
mod polling;
mod ready;
mod remote;
pub mod ring;
pub mod sync;
mod task;
mod unix_socket;

pub use blocking::{Blocking, Worker};
pub use clock::{Elapsed, Instant, Sleep, Timeout};
pub use executor::Runtime;
pub use handle::{Handle, YieldNow};
pub use polling::PollPolicy;
pub use remote::Remote;
pub use task::Task;
pub use unix_socket::remove_socket;

/// What a runtime is built with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Entries of the submission queue, a power of two; the completion queue has four times as many.
    pub entries: u32,
    /// Slots for registered buffers: one per request of a zero-copy export.
    pub buffer_slots: u32,
    /// Slots for registered files; files beyond them are used by descriptor.
    pub file_slots: u32,
    /// Threads at most for blocking system calls.
    pub blocking_threads: usize,
    /// Threads at most for long work that gives way.
    pub background_threads: usize,
    /// How long the loop may look for events before it sleeps, unless it is told otherwise.
    pub polling: PollPolicy,
    /// Where random numbers come from.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            entries: 256,
            buffer_slots: 4096,
            file_slots: 64,
            blocking_threads: 4,
            background_threads: processors().min(MOST_BACKGROUND),
            polling: PollPolicy::default(),
            seed: 0,
        }
    }
}

/// Two keep a file busy: one reads while the other writes. More are for several files.
const MOST_BACKGROUND: usize = 4;

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests;

//! The copy engine: one ladder for every job.
//!
//! A [`Copier`] makes a range of one node equal to what is read through another, by the cheapest way
//! that both allow: zeroes as zeroes, plain data as a slice of the file it lies in (which the target's
//! file shares or copies inside the kernel, off this thread), the rest through memory. [`run`] keeps
//! several pieces of such work in flight, and a [`Pace`] says how many, so that a guest under load
//! keeps its latency. What is to be copied, in which order, how fast, and what an error means is the
//! job's affair.
//!
//! Invariants:
//! - No lock is held while a request waits at the gate of a root edge. Who needs a piece to be atomic
//!   towards the guest holds its range and passes edges that have no gate.
//! - A piece that has begun runs to its end, also where nobody waits for it any more.

mod copier;
mod pace;
mod parallel;
mod plan;

#[cfg(test)]
mod tests;

pub use copier::{Copier, CopyError, CopyOptions};
pub use pace::Pace;
pub use parallel::run;

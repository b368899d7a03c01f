//! A lock on one thing, first come first served: a range lock over a single byte.

use crate::block::{LockMode, RangeGuard, RangeLock};
use crate::range::ByteRange;

/// Whose turn it is to do something that one task at a time may do.
#[derive(Default)]
pub(super) struct Turn(RangeLock);

impl Turn {
    /// Waits for the turn, which ends when the guard is dropped.
    pub(super) async fn take(&self) -> RangeGuard {
        let everything = ByteRange::between(0, 1);
        self.0.lock(everything, LockMode::Exclusive).await
    }
}

//! When a cluster that lost its mapping may be used again.
//!
//! Two things must have happened: the disk no longer has the mapping, and every transfer that looked
//! at the mapping while it was there has ended. Transfers count themselves in the epoch in which
//! they looked; a batch of freed clusters closes the epoch and waits for it and all before it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use crate::block::InFlight;
use crate::range::ByteRange;

/// Host bytes that lost their mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// Each host cluster touched loses one reference.
    pub(super) range: ByteRange,
    /// The file may discard it.
    pub(super) discard: bool,
}

struct Batch {
    epoch: Rc<Cell<u32>>,
    freed: Vec<Freed>,
}

/// Clusters on their way to be free.
#[derive(Default)]
pub(super) struct Epochs {
    current: RefCell<Rc<Cell<u32>>>,
    /// The mapping is gone in memory, perhaps not on disk.
    unmapped: RefCell<Vec<Freed>>,
    /// The mapping is gone on disk; transfers may be in flight.
    sealed: RefCell<VecDeque<Batch>>,
}

impl Epochs {
    /// Counts a transfer that has looked at a mapping just now.
    pub(super) fn enter(&self) -> InFlight {
        InFlight::enter(&self.current.borrow())
    }

    /// The mapping of these bytes was taken away, in memory.
    pub(super) fn unmap(&self, freed: Freed) {
        self.unmapped.borrow_mut().push(freed);
    }

    /// What has been unmapped so far, for a write-back that begins.
    pub(super) fn take_unmapped(&self) -> Vec<Freed> {
        self.unmapped.take()
    }

    /// A write-back did not get as far as making the unmapping durable.
    pub(super) fn put_back(&self, mut freed: Vec<Freed>) {
        freed.append(&mut self.unmapped.borrow_mut());
        self.unmapped.replace(freed);
    }

    /// The unmapping is durable. Transfers that began before now may still be in flight.
    pub(super) fn seal(&self, freed: Vec<Freed>) {
        if !freed.is_empty() {
            let epoch = self.current.replace(Rc::default());
            self.sealed.borrow_mut().push_back(Batch { epoch, freed });
        }
    }

    /// The next batch that nobody can reach any more.
    pub(super) fn take_quiet(&self) -> Option<Vec<Freed>> {
        let mut sealed = self.sealed.borrow_mut();
        if sealed.front()?.epoch.get() > 0 {
            return None;
        }
        sealed.pop_front().map(|batch| batch.freed)
    }

    /// A batch has become free to be taken.
    pub(super) fn has_quiet(&self) -> bool {
        let sealed = self.sealed.borrow();
        sealed.front().is_some_and(|batch| batch.epoch.get() == 0)
    }

    /// Freed ranges whose unmapping waits for the disk.
    pub(super) fn unmapped(&self) -> usize {
        self.unmapped.borrow().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn freed(start: u64) -> Freed {
        Freed {
            range: ByteRange::between(start, start + 1),
            discard: false,
        }
    }

    #[test]
    fn a_batch_waits_for_transfers_of_its_epoch_and_all_before() {
        let epochs = Epochs::default();
        let early = epochs.enter();
        epochs.seal(vec![freed(1)]);
        epochs.seal(vec![freed(2)]);
        let late = epochs.enter();
        assert!(
            epochs.take_quiet().is_none(),
            "a transfer of the first epoch is in flight"
        );
        drop(early);
        assert_eq!(epochs.take_quiet(), Some(vec![freed(1)]));
        assert_eq!(epochs.take_quiet(), Some(vec![freed(2)]));
        epochs.seal(vec![freed(3)]);
        assert!(!epochs.has_quiet());
        drop(late);
        assert!(epochs.has_quiet());
    }

    #[test]
    fn a_failed_write_back_loses_no_freed_cluster() {
        let epochs = Epochs::default();
        epochs.unmap(freed(1));
        let taken = epochs.take_unmapped();
        epochs.unmap(freed(2));
        epochs.put_back(taken);
        assert_eq!(epochs.take_unmapped(), vec![freed(1), freed(2)]);
    }
}

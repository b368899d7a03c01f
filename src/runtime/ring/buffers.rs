//! Who may use which slots of the ring's table of registered buffers.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Ring, Shared};

/// Slots of the table, in ranges.
pub(super) struct BufferTable {
    slots: u32,
    /// Ranges in use: start and count, sorted.
    claimed: RefCell<Vec<(u32, u32)>>,
}

impl BufferTable {
    pub(super) fn new(slots: u32) -> BufferTable {
        BufferTable {
            slots,
            claimed: RefCell::default(),
        }
    }

    /// The first gap of `count` slots.
    fn claim(&self, count: u32) -> Option<u32> {
        let mut claimed = self.claimed.borrow_mut();
        let mut start = 0;
        let mut position = 0;
        for (taken, length) in claimed.iter() {
            if taken - start >= count {
                break;
            }
            start = taken + length;
            position += 1;
        }
        if self.slots - start < count {
            return None;
        }
        claimed.insert(position, (start, count));
        Some(start)
    }

    fn release(&self, start: u32) {
        self.claimed
            .borrow_mut()
            .retain(|(taken, _)| *taken != start);
    }
}

/// A range of slots in the ring's table of registered buffers; given back on drop.
pub struct BufferSlots {
    shared: Rc<Shared>,
    start: u32,
    count: u32,
}

impl BufferSlots {
    /// The slot number of the range's `index`-th slot.
    pub fn slot(&self, index: u32) -> u16 {
        assert!(index < self.count, "slot {index} of {}", self.count);
        u16::try_from(self.start + index).unwrap_or_else(|_| unreachable!("the table is smaller"))
    }
}

impl Drop for BufferSlots {
    fn drop(&mut self) {
        self.shared.buffers.release(self.start);
    }
}

impl Ring {
    /// Reserves `count` (not 0) slots for buffers that the kernel registers; `None` where the kernel
    /// has no table or too few slots are free.
    pub fn claim_buffer_slots(&self, count: u32) -> Option<BufferSlots> {
        let start = self.shared.buffers.claim(count)?;
        Some(BufferSlots {
            shared: self.shared.clone(),
            start,
            count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_gaps_are_used_again() {
        let table = BufferTable::new(100);
        assert_eq!(table.claim(40), Some(0));
        assert_eq!(table.claim(40), Some(40));
        assert_eq!(table.claim(40), None);
        table.release(0);
        assert_eq!(table.claim(30), Some(0));
        assert_eq!(table.claim(20), Some(80));
        assert_eq!(table.claim(10), Some(30));
        assert_eq!(table.claim(1), None);
        assert_eq!(BufferTable::new(0).claim(1), None);
    }
}

//! Does copying get ahead of the guest?

use std::cell::Cell;

/// After so many passes in vain the guest's writes go to both.
const MOST_IN_VAIN: u32 = 2;

/// After so many passes without an end they do too: the guest may write in bursts.
const MOST_PASSES: u32 = 16;

/// Of the passes through the disk since nothing was dirty.
#[derive(Clone, Copy, Default)]
struct Pass {
    /// What was dirty when the last one began.
    dirty: u64,
    /// Passes in a row that left more than half of what there was.
    in_vain: u32,
    passes: u32,
}

/// Counts what each pass through the disk has left.
#[derive(Default)]
pub(super) struct Passes {
    last: Cell<Pass>,
}

impl Passes {
    /// A pass begins, with this much dirty. False: the passes do not converge.
    pub(super) fn begin(&self, dirty: u64) -> bool {
        let before = self.last.get();
        if dirty == 0 {
            self.last.set(Pass::default());
            return true;
        }
        let in_vain = if dirty > before.dirty / 2 {
            before.in_vain + 1
        } else {
            0
        };
        let passes = before.passes + 1;
        self.last.set(Pass {
            dirty,
            in_vain,
            passes,
        });
        in_vain <= MOST_IN_VAIN && passes <= MOST_PASSES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_converge_that_leave_half_at_most() {
        let passes = Passes::default();
        assert!(
            [800, 400, 200, 100]
                .into_iter()
                .all(|dirty| passes.begin(dirty))
        );
        assert!(passes.begin(0));
        assert!(passes.begin(800) && passes.begin(700));
        assert!(!passes.begin(690), "twice in vain");
    }

    #[test]
    fn passes_without_an_end_do_not_converge() {
        let passes = Passes::default();
        let mut dirty = 1 << 40;
        let mut count = 0;
        while passes.begin(dirty) {
            dirty = (dirty / 2).max(2);
            count += 1;
        }
        assert_eq!(count, MOST_PASSES);
    }
}

//! Which regions of a disk are marked in what is stored of its bitmaps.

use crate::range::ByteRange;

use super::DirtyBitmap;

/// Nothing is written to a region that is not marked. A mark may go when no write to the region is in
/// flight, and what is stored of it has been written anew.
pub struct KeptRegions {
    marked: DirtyBitmap,
    /// Changes in flight, by region.
    in_flight: Vec<u32>,
}

impl KeptRegions {
    /// Regions of so many bytes, none of which is marked.
    pub(super) fn new(size: u64, region: u64) -> KeptRegions {
        let mut regions = KeptRegions {
            marked: DirtyBitmap::new(size, region),
            in_flight: Vec::new(),
        };
        regions.resize(size);
        regions
    }

    /// The disk has another size; changes of what is cut off may be in flight still.
    pub(super) fn resize(&mut self, size: u64) {
        self.marked.resize(size);
        let regions = size.div_ceil(self.marked.granularity()) as usize;
        self.in_flight.resize(self.in_flight.len().max(regions), 0);
    }

    /// What is marked.
    pub fn marked(&self) -> &DirtyBitmap {
        &self.marked
    }

    /// All of the range is marked.
    pub(super) fn covers(&self, range: ByteRange) -> bool {
        let clean = self.marked.next_clean(range.start());
        clean.is_none_or(|clean| clean >= range.end())
    }

    pub(super) fn mark(&mut self, range: ByteRange) {
        self.marked.set(range);
    }

    /// A change of the range begins (1) or ends (-1).
    pub(super) fn count(&mut self, range: ByteRange, change: i32) {
        let region = self.marked.granularity();
        let (first, last) = (range.start() / region, (range.end() - 1) / region);
        for index in first..=last {
            if let Some(count) = self.in_flight.get_mut(index as usize) {
                *count = count.wrapping_add_signed(change);
            }
        }
    }

    /// Takes the marks of regions that no change is in flight to; answers which.
    pub(super) fn unmark_quiet(&mut self) -> Vec<ByteRange> {
        let region = self.marked.granularity();
        let mut quiet: Vec<ByteRange> = Vec::new();
        for run in self.marked.runs() {
            let mut start = run.start();
            while start < run.end() {
                let end = run.end().min(start + region);
                if self.in_flight[(start / region) as usize] == 0 {
                    quiet.push(ByteRange::between(start, end));
                }
                start = end;
            }
        }
        for range in &quiet {
            self.marked.clear(*range);
        }
        quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_stays_while_a_change_is_in_flight() {
        let range = |start: u64, end: u64| ByteRange::between(start << 10, end << 10);
        let mut regions = KeptRegions::new(10 << 10, 1 << 10);
        assert!(!regions.covers(range(0, 1)));
        regions.mark(ByteRange::between(0, 3 << 10 | 1));
        assert!(regions.covers(range(1, 4)) && !regions.covers(range(3, 5)));
        let over_two = ByteRange::between(1023, 1025);
        regions.count(over_two, 1);
        assert_eq!(regions.unmark_quiet(), [range(2, 3), range(3, 4)]);
        regions.count(over_two, -1);
        assert_eq!(regions.unmark_quiet().len(), 2);
        assert!(regions.unmark_quiet().is_empty());
    }

    #[test]
    fn a_change_may_end_after_its_region_was_cut_off() {
        let range = |start: u64, end: u64| ByteRange::between(start << 10, end << 10);
        let mut regions = KeptRegions::new(4 << 10, 1 << 10);
        regions.mark(range(0, 4));
        regions.count(range(3, 4), 1);
        regions.resize(1 << 10);
        regions.resize(4 << 10);
        assert!(!regions.covers(range(3, 4)));
        regions.mark(range(3, 4));
        regions.count(range(3, 4), -1);
        assert_eq!(regions.unmark_quiet().len(), 2);
    }
}

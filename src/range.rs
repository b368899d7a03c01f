//! Byte ranges and alignment arithmetic.

use std::fmt;

/// A range of bytes; never wraps: `start + length <= u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    length: u64,
}

impl ByteRange {
    /// `length` bytes from `start`; `None` where the end would pass 2^64 - 1.
    pub fn new(start: u64, length: u64) -> Option<ByteRange> {
        start
            .checked_add(length)
            .map(|_| ByteRange { start, length })
    }

    /// From `start` up to, not including, `end`. Asserts `start <= end`.
    pub fn between(start: u64, end: u64) -> ByteRange {
        assert!(
            start <= end,
            "range ends at {end:#x} before its start {start:#x}"
        );
        ByteRange {
            start,
            length: end - start,
        }
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes in the range.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// No bytes in it.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Share at least one byte.
    pub fn overlaps(&self, other: &ByteRange) -> bool {
        self.start < other.end()
            && other.start < self.end()
            && !self.is_empty()
            && !other.is_empty()
    }

    /// Every byte of `other` is in this range.
    pub fn contains(&self, other: &ByteRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The bytes both have; `None` where there are none.
    pub fn intersection(&self, other: &ByteRange) -> Option<ByteRange> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| ByteRange::between(start, end))
    }

    /// Grown outward to multiples of `alignment` (a power of two); saturates at the last multiple.
    pub fn align_outward(&self, alignment: u64) -> ByteRange {
        let start = align_down(self.start, alignment);
        let end = align_up(self.end(), alignment).unwrap_or(align_down(u64::MAX, alignment));
        ByteRange::between(start, end.max(start))
    }

    /// Shrunk inward to multiples of `alignment` (a power of two); `None` where nothing is left.
    pub fn align_inward(&self, alignment: u64) -> Option<ByteRange> {
        let start = align_up(self.start, alignment)?;
        let end = align_down(self.end(), alignment);
        (start < end).then(|| ByteRange::between(start, end))
    }

    /// Start and length are multiples of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: u64) -> bool {
        is_aligned(self.start, alignment) && is_aligned(self.length, alignment)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.length)
    }
}

/// The largest multiple of `alignment` (a power of two) not above `value`.
pub fn align_down(value: u64, alignment: u64) -> u64 {
    debug_assert!(alignment.is_power_of_two());
    value & !(alignment - 1)
}

/// The smallest multiple of `alignment` (a power of two) not below `value`; `None` past 2^64 - 1.
pub fn align_up(value: u64, alignment: u64) -> Option<u64> {
    value
        .checked_add(alignment - 1)
        .map(|value| align_down(value, alignment))
}

/// `value` is a multiple of `alignment` (a power of two).
pub fn is_aligned(value: u64, alignment: u64) -> bool {
    align_down(value, alignment) == value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_ranges_do_not_exist() {
        assert_eq!(ByteRange::new(u64::MAX, 1), None);
        assert!(ByteRange::new(u64::MAX, 0).is_some());
    }

    #[test]
    fn empty_ranges_overlap_nothing() {
        let empty = ByteRange::between(5, 5);
        assert!(!empty.overlaps(&ByteRange::between(0, 10)));
    }

    #[test]
    fn alignment_inward_and_outward() {
        let range = ByteRange::between(100, 9000);
        assert_eq!(
            range.align_inward(4096),
            Some(ByteRange::between(4096, 8192))
        );
        assert_eq!(range.align_outward(4096), ByteRange::between(0, 12288));
        assert_eq!(ByteRange::between(1, 4095).align_inward(4096), None);
    }

    #[test]
    fn outward_alignment_saturates() {
        let range = ByteRange::between(u64::MAX - 10, u64::MAX);
        assert!(range.align_outward(4096).is_aligned(4096));
    }
}

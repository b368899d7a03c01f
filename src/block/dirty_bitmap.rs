//! Which parts of a disk were changed.

use crate::range::ByteRange;

/// A bit for each `granularity` bytes of a disk, set where something in them was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    granularity: u64,
    size: u64,
    words: Vec<u64>,
    count: u64,
}

const WORD: u64 = u64::BITS as u64;

impl DirtyBitmap {
    /// A disk of `size` bytes, nothing of it changed. `granularity` is a power of two.
    pub fn new(size: u64, granularity: u64) -> DirtyBitmap {
        assert!(granularity.is_power_of_two(), "granularity {granularity}");
        let bits = size.div_ceil(granularity);
        DirtyBitmap {
            granularity,
            size,
            words: vec![0; bits.div_ceil(WORD) as usize],
            count: 0,
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Bytes of all parts that are set; the last part counts as whole as the others.
    pub fn dirty_bytes(&self) -> u64 {
        self.count * self.granularity
    }

    /// Nothing is set.
    pub fn is_clean(&self) -> bool {
        self.count == 0
    }

    /// Sets every part that the range touches; answers how many bytes were not set before.
    pub fn set(&mut self, range: ByteRange) -> u64 {
        self.change(range, |word, mask| *word | mask)
    }

    /// Clears every part that the range touches; answers how many bytes were set before.
    pub fn clear(&mut self, range: ByteRange) -> u64 {
        self.change(range, |word, mask| *word & !mask)
    }

    /// Where the first set part from `start` on begins.
    pub fn next_dirty(&self, start: u64) -> Option<u64> {
        self.find(start, self.size, |word| word)
    }

    /// The first byte of the range that is set.
    pub fn first_dirty(&self, range: ByteRange) -> Option<u64> {
        self.find(range.start(), range.end(), |word| word)
    }

    /// The first byte of the range that is not set; nothing is beyond the disk.
    pub fn first_clean(&self, range: ByteRange) -> Option<u64> {
        let inside = self.find(range.start(), range.end(), |word| !word);
        inside.or_else(|| (range.end() > self.size).then(|| self.size.max(range.start())))
    }

    /// Where the first part from `start` on that is not set begins.
    pub fn next_clean(&self, start: u64) -> Option<u64> {
        self.find(start, self.size, |word| !word)
    }

    /// The first run of set parts from `start` on, cut to `most` bytes (at least one part) and to the disk.
    pub fn next_run(&self, start: u64, most: u64) -> Option<ByteRange> {
        let first = self.next_dirty(start)?;
        let most = first.saturating_add(most.max(self.granularity));
        let most = most.min(self.size);
        let end = self.find(first, most, |word| !word).unwrap_or(most);
        Some(ByteRange::between(first, end))
    }

    /// All runs of set parts, cut to the disk.
    pub fn runs(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let mut start = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(start, u64::MAX)?;
            start = run.end();
            Some(run)
        })
    }

    /// Sets every part that touches what is set in `other`, whose granularity may be another.
    pub fn merge(&mut self, other: &DirtyBitmap) {
        if other.granularity != self.granularity {
            other.runs().for_each(|run| {
                self.set(run);
            });
            return;
        }
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            self.count += u64::from((more & !*word).count_ones());
            *word |= more;
        }
    }

    /// The disk has `size` bytes from now on. New parts are clean; a part that is cut keeps its bit.
    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            let first = size.next_multiple_of(self.granularity);
            self.clear(ByteRange::between(first.min(self.size), self.size));
        }
        let bits = size.div_ceil(self.granularity);
        self.words.resize(bits.div_ceil(WORD) as usize, 0);
        self.size = size;
    }

    /// The bits, 64 in a word, the first part's in the lowest bit of the first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Sets what is set in these words, the first of which has the number `first`. Bits beyond the disk
    /// do not count.
    pub fn set_words(&mut self, first: usize, words: &[u64]) {
        let bits = self.size.div_ceil(self.granularity);
        for (index, more) in (first..self.words.len()).zip(words) {
            let left = bits - index as u64 * WORD;
            let inside = u64::MAX >> (WORD - left.min(WORD));
            let word = &mut self.words[index];
            self.count += u64::from((more & inside & !*word).count_ones());
            *word |= more & inside;
        }
    }

    /// The first byte from `start` on, before `end`, of a part whose bit is set in what `of` makes of its word.
    fn find(&self, start: u64, end: u64, of: impl Fn(u64) -> u64) -> Option<u64> {
        let end = end.min(self.size);
        if start >= end {
            return None;
        }
        let bit = start / self.granularity;
        let first = (bit / WORD) as usize;
        let last = ((end - 1) / self.granularity / WORD) as usize;
        for (index, word) in self.words[..=last].iter().enumerate().skip(first) {
            let skipped = if index == first { bit % WORD } else { 0 };
            let word = of(*word) >> skipped << skipped;
            if word != 0 {
                let found = index as u64 * WORD + u64::from(word.trailing_zeros());
                let offset = found * self.granularity;
                return (offset < end).then_some(offset.max(start));
            }
        }
        None
    }

    fn change(&mut self, range: ByteRange, of: impl Fn(&u64, u64) -> u64) -> u64 {
        let end = range.end().min(self.size);
        if range.start() >= end {
            return 0;
        }
        let (first, last) = (
            range.start() / self.granularity,
            (end - 1) / self.granularity,
        );
        let before = self.count;
        for index in first / WORD..=last / WORD {
            let low = first.saturating_sub(index * WORD).min(WORD - 1);
            let high = (last - index * WORD).min(WORD - 1);
            let mask = (u64::MAX >> (WORD - 1 - high)) & (u64::MAX << low);
            let word = &mut self.words[index as usize];
            let old = word.count_ones();
            *word = of(word, mask);
            self.count = self.count + u64::from(word.count_ones()) - u64::from(old);
        }
        before.abs_diff(self.count) * self.granularity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end)
    }

    #[test]
    fn touching_a_part_sets_all_of_it() {
        let mut bitmap = DirtyBitmap::new(1 << 20, 4096);
        assert_eq!(bitmap.set(range(4095, 4097)), 8192);
        assert_eq!(bitmap.set(range(0, 1)), 0, "set before");
        assert_eq!(bitmap.next_run(0, u64::MAX), Some(range(0, 8192)));
        assert_eq!(bitmap.clear(range(0, 4096)), 4096);
        assert_eq!(bitmap.next_run(0, u64::MAX), Some(range(4096, 8192)));
    }

    #[test]
    fn runs_cross_words_and_end_with_the_disk() {
        let mut bitmap = DirtyBitmap::new(200 * 512 + 100, 512);
        bitmap.set(range(60 * 512, u64::MAX));
        let all = bitmap.next_run(0, u64::MAX);
        assert_eq!(all, Some(range(60 * 512, 200 * 512 + 100)));
        assert_eq!(bitmap.next_run(0, 1024), Some(range(60 * 512, 62 * 512)));
        assert_eq!(bitmap.dirty_bytes(), 141 * 512);
        bitmap.clear(range(0, u64::MAX));
        assert!(bitmap.is_clean());
        assert_eq!(bitmap.next_dirty(0), None);
    }

    /// A job that had copied up to the end of a disk whose last part is not a whole one looked on from there:
    /// it was given an empty run again and again while the guest had changed that part, and span for ever.
    #[test]
    fn nothing_is_found_from_the_end_of_the_disk_on() {
        let mut bitmap = DirtyBitmap::new(4096 + 512, 4096);
        bitmap.set(range(4096, 4608));
        assert_eq!(bitmap.next_run(4608, u64::MAX), None);
        assert_eq!(bitmap.next_run(0, u64::MAX), Some(range(4096, 4608)));
    }

    #[test]
    fn a_merge_reaches_every_part_that_is_touched() {
        let mut fine = DirtyBitmap::new(1 << 20, 512);
        fine.set(range(65536 - 512, 65536 + 512));
        let mut coarse = DirtyBitmap::new(1 << 20, 65536);
        coarse.merge(&fine);
        assert_eq!(coarse.next_run(0, u64::MAX), Some(range(0, 131_072)));
        fine.merge(&coarse);
        assert_eq!(fine.dirty_bytes(), 131_072);
        let mut other = DirtyBitmap::new(1 << 20, 512);
        other.set(range(131_072 - 512, 131_072 + 512));
        fine.merge(&other);
        assert_eq!(fine.dirty_bytes(), 131_072 + 512);
    }

    #[test]
    fn what_is_cut_off_is_clean_when_it_comes_again() {
        let mut bitmap = DirtyBitmap::new(100 * 4096, 4096);
        bitmap.set(range(0, u64::MAX));
        bitmap.resize(70 * 4096 + 1);
        assert_eq!(bitmap.dirty_bytes(), 71 * 4096);
        bitmap.resize(200 * 4096);
        assert_eq!(bitmap.dirty_bytes(), 71 * 4096);
        assert_eq!(bitmap.next_run(0, u64::MAX), Some(range(0, 71 * 4096)));
        bitmap.resize(0);
        assert!(bitmap.is_clean());
    }

    #[test]
    fn words_go_out_and_come_back() {
        let mut bitmap = DirtyBitmap::new(100 * 512, 512);
        bitmap.set(range(63 * 512, 66 * 512));
        let mut copy = DirtyBitmap::new(100 * 512, 512);
        copy.set_words(0, bitmap.words());
        assert_eq!(copy, bitmap);
        copy.set_words(1, &[u64::MAX, u64::MAX]);
        assert_eq!(copy.dirty_bytes(), 37 * 512, "only what the disk has");
    }

    #[test]
    fn it_agrees_with_a_plain_list_of_bits() {
        let size = 300 * 1024;
        let mut bitmap = DirtyBitmap::new(size, 1024);
        let mut plain = vec![false; 300];
        let mut random = 7_u64;
        for _ in 0..2000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            let start = (random >> 33) % size;
            let end = (start + 1 + (random >> 13) % 40_000).min(size);
            let value = random & 1 << 40 != 0;
            if value {
                bitmap.set(range(start, end));
            } else {
                bitmap.clear(range(start, end));
            }
            for part in &mut plain[(start / 1024) as usize..=((end - 1) / 1024) as usize] {
                *part = value;
            }
            let count = plain.iter().filter(|part| **part).count();
            assert_eq!(bitmap.dirty_bytes(), count as u64 * 1024);
            let first = plain.iter().position(|part| *part);
            assert_eq!(bitmap.next_dirty(0), first.map(|part| part as u64 * 1024));
            let part = range(start, end);
            let is = |value: bool| (start..end).find(|byte| plain[(byte / 1024) as usize] == value);
            assert_eq!(bitmap.first_dirty(part), is(true));
            assert_eq!(bitmap.first_clean(part), is(false));
        }
    }
}

//! A table of 64-bit entries that is kept in memory whole: the L1 table and the refcount table.

use std::collections::BTreeSet;

use crate::buffer::MemorySlice;

/// Entries that are written together: 4 KiB.
const GROUP: usize = 512;

/// Entries in host byte order, and which of them the disk does not have.
#[derive(Default)]
pub(super) struct Table {
    entries: Vec<u64>,
    dirty: BTreeSet<usize>,
}

impl Table {
    pub(super) fn new(entries: Vec<u64>) -> Table {
        Table {
            entries,
            dirty: BTreeSet::new(),
        }
    }

    /// From its bytes on disk.
    pub(super) fn parse(bytes: &[u8]) -> Table {
        let entries = bytes.chunks_exact(8).map(big_endian).collect();
        Table::new(entries)
    }

    pub(super) fn length(&self) -> usize {
        self.entries.len()
    }

    /// An entry; 0 past the end.
    pub(super) fn entry(&self, index: usize) -> u64 {
        self.entries.get(index).copied().unwrap_or(0)
    }

    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }

    pub(super) fn set(&mut self, index: usize, entry: u64) {
        self.entries[index] = entry;
        self.dirty.insert(index / GROUP);
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Copies of what the disk does not have, by group, clean from now on.
    pub(super) fn take_dirty(&mut self) -> Vec<(usize, MemorySlice)> {
        let groups = std::mem::take(&mut self.dirty);
        let copy = |group: usize| {
            let end = ((group + 1) * GROUP).min(self.entries.len());
            let bytes = serialise(&self.entries[group * GROUP..end]);
            (group, MemorySlice::from_bytes(&bytes))
        };
        groups.into_iter().map(copy).collect()
    }

    /// A group could not be written.
    pub(super) fn put_back(&mut self, group: usize) {
        self.dirty.insert(group);
    }

    /// Where a group lies in the table, in bytes.
    pub(super) fn group_offset(group: usize) -> u64 {
        (group * GROUP * 8) as u64
    }
}

/// Entries as they are on disk.
pub(super) fn serialise(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect()
}

/// The first 8 bytes as a number.
pub(super) fn big_endian(bytes: &[u8]) -> u64 {
    bytes[..8]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_groups_are_written_and_the_last_one_is_short() {
        let mut table = Table::new(vec![0; GROUP * 2 + 3]);
        table.set(1, 7);
        table.set(GROUP * 2 + 2, 9);
        let taken = table.take_dirty();
        assert!(!table.is_dirty());
        assert_eq!(taken.len(), 2);
        assert_eq!((taken[0].0, taken[0].1.length()), (0, GROUP * 8));
        assert_eq!((taken[1].0, taken[1].1.length()), (2, 24));
        assert_eq!(Table::parse(&taken[1].1.to_vec()).entries(), [0, 0, 9]);
        assert_eq!(table.entry(5000), 0);
        table.put_back(2);
        assert_eq!(table.take_dirty()[0].0, 2);
    }
}

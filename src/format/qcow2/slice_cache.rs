//! A cache of slices of metadata tables: write-back, bounded, with second-chance eviction.
//!
//! It does no I/O and knows no order: `write_back` takes copies of dirty slices and writes them.
//! Slices are only reached through closures, so that no borrow lives over an await.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::block::{LockMode, RangeGuard, RangeLock};
use crate::buffer::MemorySlice;
use crate::range::ByteRange;

/// Hashes one u64 by multiplication: keys are numbers that nobody chooses to collide.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys are u64");
    }

    fn write_u64(&mut self, number: u64) {
        let product = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<NumberHasher>>;
/// A set of numbers.
pub(super) type NumberSet = HashSet<u64, BuildHasherDefault<NumberHasher>>;

struct Slice {
    key: u64,
    bytes: Box<[u8]>,
    dirty: bool,
    /// Being written: the disk does not have it yet, so it must not be dropped and read again.
    writing: bool,
    used: bool,
    /// Entries were found that must not be trusted.
    suspect: bool,
}

impl Slice {
    fn is_droppable(&self) -> bool {
        !self.dirty && !self.writing
    }
}

/// Slices of one kind of table.
pub(super) struct SliceCache {
    slice_size: usize,
    inner: RefCell<Inner>,
    /// By key: who loads a slice holds its byte.
    loading: RangeLock,
}

struct Inner {
    slots: Vec<Slice>,
    index: NumberMap<usize>,
    most: usize,
    hand: usize,
    dirty: usize,
}

impl SliceCache {
    /// A cache of slices of `slice_size` bytes that takes about `bytes` bytes.
    pub(super) fn new(slice_size: usize, bytes: u64) -> SliceCache {
        let most = (bytes / slice_size as u64).clamp(4, 1 << 24) as usize;
        SliceCache {
            slice_size,
            inner: RefCell::new(Inner {
                slots: Vec::new(),
                index: NumberMap::default(),
                most,
                hand: 0,
                dirty: 0,
            }),
            loading: RangeLock::new(),
        }
    }

    pub(super) fn slice_size(&self) -> usize {
        self.slice_size
    }

    /// Looks at a slice; `None` where it is not here.
    pub(super) fn with<T>(&self, key: u64, look: impl FnOnce(&[u8], bool) -> T) -> Option<T> {
        let mut inner = self.inner.borrow_mut();
        let slot = *inner.index.get(&key)?;
        let slice = &mut inner.slots[slot];
        slice.used = true;
        Some(look(&slice.bytes, slice.suspect))
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.inner.borrow().index.contains_key(&key)
    }

    /// Changes a slice, which is dirty from then on. It is there: nothing was awaited since it was loaded.
    pub(super) fn change<T>(&self, key: u64, change: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut inner = self.inner.borrow_mut();
        let Some(slot) = inner.index.get(&key).copied() else {
            unreachable!("slice {key:#x} is changed, but was not kept in the cache");
        };
        let slice = &mut inner.slots[slot];
        slice.used = true;
        let was_dirty = std::mem::replace(&mut slice.dirty, true);
        let result = change(&mut slice.bytes);
        inner.dirty += usize::from(!was_dirty);
        result
    }

    /// The right to load a slice; `None` where it is there, perhaps now that another task loaded it.
    pub(super) async fn begin_load(&self, key: u64) -> Option<RangeGuard> {
        let place = ByteRange::between(key, key + 1);
        let guard = self.loading.lock(place, LockMode::Exclusive).await;
        (!self.contains(key)).then_some(guard)
    }

    /// Puts a slice in. The cache may be over its bound afterwards, where all else is dirty.
    pub(super) fn insert(&self, key: u64, bytes: Box<[u8]>, dirty: bool, suspect: bool) {
        assert_eq!(bytes.len(), self.slice_size, "a slice of another size");
        let mut inner = self.inner.borrow_mut();
        assert!(!inner.index.contains_key(&key), "slice {key:#x} is there");
        while inner.slots.len() >= inner.most && inner.drop_one() {}
        let slot = inner.slots.len();
        inner.dirty += usize::from(dirty);
        inner.slots.push(Slice {
            key,
            bytes,
            dirty,
            writing: false,
            used: true,
            suspect,
        });
        inner.index.insert(key, slot);
    }

    /// A slice more would not fit, as too much is dirty.
    pub(super) fn is_congested(&self) -> bool {
        let inner = self.inner.borrow();
        inner.slots.len() >= inner.most && inner.dirty * 2 > inner.most
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.inner.borrow().dirty > 0
    }

    /// Copies of all dirty slices, by key, which count as clean and being written from now on.
    pub(super) fn take_dirty(&self) -> Vec<(u64, MemorySlice)> {
        let mut inner = self.inner.borrow_mut();
        let mut taken = Vec::with_capacity(inner.dirty);
        for slice in inner.slots.iter_mut().filter(|slice| slice.dirty) {
            slice.dirty = false;
            slice.writing = true;
            taken.push((slice.key, MemorySlice::from_bytes(&slice.bytes)));
        }
        inner.dirty = 0;
        taken.sort_unstable_by_key(|(key, _)| *key);
        taken
    }

    /// The end of writing a slice; a failed one is dirty again.
    pub(super) fn written(&self, key: u64, is_written: bool) {
        let mut inner = self.inner.borrow_mut();
        let Some(slot) = inner.index.get(&key).copied() else {
            return;
        };
        let slice = &mut inner.slots[slot];
        slice.writing = false;
        if !is_written && !slice.dirty {
            slice.dirty = true;
            inner.dirty += 1;
        }
    }

    /// Forgets slices, dirty or not: their table is gone.
    pub(super) fn forget(&self, keys: std::ops::Range<u64>) {
        let mut inner = self.inner.borrow_mut();
        let mut slot = 0;
        while slot < inner.slots.len() {
            if keys.contains(&inner.slots[slot].key) {
                inner.remove(slot);
            } else {
                slot += 1;
            }
        }
    }
}

impl Inner {
    /// Drops one slice that is clean and that nobody needs; false where there is none.
    fn drop_one(&mut self) -> bool {
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slice = &mut self.slots[self.hand];
            if !slice.is_droppable() {
                continue;
            }
            if !std::mem::take(&mut slice.used) {
                self.remove(self.hand);
                return true;
            }
        }
        false
    }

    fn remove(&mut self, slot: usize) {
        let slice = self.slots.swap_remove(slot);
        self.dirty -= usize::from(slice.dirty);
        self.index.remove(&slice.key);
        if let Some(moved) = self.slots.get(slot) {
            self.index.insert(moved.key, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(most: u64) -> SliceCache {
        SliceCache::new(512, most * 512)
    }

    fn slice(value: u8) -> Box<[u8]> {
        vec![value; 512].into()
    }

    #[test]
    fn clean_slices_give_way_and_dirty_ones_stay() {
        let cache = cache(4);
        cache.insert(0, slice(0), true, false);
        cache.insert(1, slice(1), false, false);
        for key in 2..20 {
            cache.insert(key, slice(key as u8), false, false);
        }
        assert_eq!(cache.inner.borrow().slots.len(), 4);
        assert!(cache.contains(0) && cache.contains(19));
        assert_eq!(cache.with(19, |bytes, _| bytes[0]), Some(19));
    }

    #[test]
    fn a_slice_that_is_being_written_is_not_dropped() {
        let cache = cache(4);
        cache.insert(7, slice(7), true, false);
        assert_eq!(cache.take_dirty().len(), 1);
        assert!(!cache.is_dirty());
        for key in 10..30 {
            cache.insert(key, slice(0), false, false);
        }
        assert!(cache.contains(7));
        cache.written(7, false);
        assert!(cache.is_dirty());
        cache.take_dirty();
        cache.written(7, true);
        for key in 30..50 {
            cache.insert(key, slice(0), false, false);
        }
        assert!(!cache.contains(7));
    }

    #[test]
    fn a_slice_changed_while_it_is_written_stays_dirty() {
        let cache = cache(4);
        cache.insert(1, slice(1), true, false);
        let taken = cache.take_dirty();
        cache.change(1, |bytes| bytes[0] = 9);
        cache.written(1, true);
        assert!(cache.is_dirty());
        assert_eq!(taken[0].1.to_vec()[0], 1);
        cache.forget(0..10);
        assert!(!cache.is_dirty() && !cache.contains(1));
    }
}

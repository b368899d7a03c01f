//! The content of a disk with a volatile write cache: what is read now, and what may be left of it
//! when power fails.
//!
//! The unit is the sector of 512 bytes, which is never torn. For each sector written since the last
//! flush every version is kept; a crash leaves any one of them or the durable one, each sector for
//! itself. The size of the disk is kept in the same way.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::Random;

/// Bytes that a crash never tears.
pub const SECTOR: u64 = 512;

/// `None`: zeroes, without space kept for them.
type Sector = Option<Rc<[u8; SECTOR as usize]>>;

/// What a disk holds.
#[derive(Clone, Default)]
pub struct VolatileStore {
    visible: BTreeMap<u64, Rc<[u8; SECTOR as usize]>>,
    durable: BTreeMap<u64, Rc<[u8; SECTOR as usize]>>,
    versions: BTreeMap<u64, Vec<(u64, Sector)>>,
    size: u64,
    durable_size: u64,
    sizes: Vec<(u64, u64)>,
    sequence: u64,
}

impl VolatileStore {
    /// These bytes, all durable.
    pub fn from_bytes(bytes: &[u8]) -> VolatileStore {
        let mut store = VolatileStore::default();
        store.write(0, bytes);
        store.truncate(bytes.len() as u64);
        store.flush(store.sequence());
        store
    }

    /// Bytes on the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Names this moment, for [`VolatileStore::flush`].
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The disk from start to end, as it is read.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// Reads; past the end there are zeroes.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let end = offset + bytes.len() as u64;
        if bytes.is_empty() {
            return;
        }
        for (number, sector) in self.visible.range(offset / SECTOR..=(end - 1) / SECTOR) {
            let start = offset.max(number * SECTOR);
            let stop = end.min((number + 1) * SECTOR);
            let source = &sector[(start - number * SECTOR) as usize..][..(stop - start) as usize];
            bytes[(start - offset) as usize..][..source.len()].copy_from_slice(source);
        }
    }

    /// Writes, growing the disk where the range ends past its end.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.sequence += 1;
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let number = at / SECTOR;
            let stop = end.min((number + 1) * SECTOR);
            let mut content = self
                .visible
                .get(&number)
                .map_or([0; SECTOR as usize], |sector| **sector);
            content[(at % SECTOR) as usize..][..(stop - at) as usize]
                .copy_from_slice(&bytes[(at - offset) as usize..(stop - offset) as usize]);
            self.put(number, Some(Rc::new(content)));
            at = stop;
        }
        self.grow(end);
    }

    /// Zeroes a range, growing the disk where the range ends past its end. Space is given back.
    pub fn zero(&mut self, offset: u64, length: u64) {
        self.sequence += 1;
        let end = offset + length;
        if length == 0 {
            return;
        }
        let touched = self.visible.range(offset / SECTOR..=(end - 1) / SECTOR);
        let touched: Vec<u64> = touched.map(|(number, _)| *number).collect();
        for number in touched {
            let start = offset.max(number * SECTOR);
            let stop = end.min((number + 1) * SECTOR);
            if stop - start == SECTOR {
                self.put(number, None);
            } else {
                let mut content = *self.visible[&number];
                content[(start % SECTOR) as usize..][..(stop - start) as usize].fill(0);
                self.put(number, Some(Rc::new(content)));
            }
        }
        self.grow(end);
    }

    /// Sets the size.
    pub fn truncate(&mut self, size: u64) {
        self.sequence += 1;
        if size < self.size {
            let end = self.size.next_multiple_of(SECTOR);
            self.zero(size, end - size);
        }
        self.set_size(size);
    }

    fn grow(&mut self, end: u64) {
        if end > self.size {
            self.set_size(end);
        }
    }

    fn set_size(&mut self, size: u64) {
        self.size = size;
        self.sizes.push((self.sequence, size));
    }

    fn put(&mut self, number: u64, sector: Sector) {
        match &sector {
            Some(content) => self.visible.insert(number, content.clone()),
            None => self.visible.remove(&number),
        };
        let versions = self.versions.entry(number).or_default();
        versions.push((self.sequence, sector));
    }

    /// What was there at that moment is durable.
    pub fn flush(&mut self, sequence: u64) {
        for (number, versions) in &mut self.versions {
            settle(&mut self.durable, *number, versions, sequence);
        }
        self.versions.retain(|_, versions| !versions.is_empty());
        self.settle_size(sequence);
    }

    /// A range is durable as it is read now, and so is a size that has it on the disk.
    pub fn make_durable(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        for number in offset / SECTOR..end.div_ceil(SECTOR) {
            if let Some(mut versions) = self.versions.remove(&number) {
                settle(&mut self.durable, number, &mut versions, u64::MAX);
            }
        }
        if end > self.durable_size {
            self.settle_size(u64::MAX);
        }
    }

    fn settle_size(&mut self, sequence: u64) {
        let settled = self.sizes.partition_point(|(at, _)| *at <= sequence);
        if let Some((_, size)) = self.sizes.drain(..settled).next_back() {
            self.durable_size = size;
        }
    }

    /// What power loss leaves; the seed decides.
    pub fn crash(&self, random: &mut Random) -> VolatileStore {
        let survival = Survival::draw(random, self.sequence);
        let mut content = self.durable.clone();
        for (number, versions) in &self.versions {
            if let Some(index) = survival.pick(random, versions) {
                match &versions[index].1 {
                    Some(sector) => content.insert(*number, sector.clone()),
                    None => content.remove(number),
                };
            }
        }
        let size = survival
            .pick(random, &self.sizes)
            .map_or(self.durable_size, |index| self.sizes[index].1);
        cut(&mut content, size);
        VolatileStore {
            visible: content.clone(),
            durable: content,
            versions: BTreeMap::new(),
            size,
            durable_size: size,
            sizes: Vec::new(),
            sequence: 0,
        }
    }

    /// Whether the sector of `offset` has data, and up to where that is so; never past `end`.
    pub fn extent(&self, offset: u64, end: u64) -> (bool, u64) {
        let first = offset / SECTOR;
        let stop = |number: u64| (number * SECTOR).min(end);
        if !self.visible.contains_key(&first) {
            let next = self.visible.range(first..).next();
            return (false, next.map_or(end, |(number, _)| stop(*number)));
        }
        let mut after = first + 1;
        for (number, _) in self.visible.range(after..end.div_ceil(SECTOR)) {
            if *number != after {
                break;
            }
            after += 1;
        }
        (true, stop(after))
    }
}

/// The newest version that is not newer than `sequence` becomes durable.
fn settle(
    durable: &mut BTreeMap<u64, Rc<[u8; SECTOR as usize]>>,
    number: u64,
    versions: &mut Vec<(u64, Sector)>,
    sequence: u64,
) {
    let settled = versions.partition_point(|(at, _)| *at <= sequence);
    match versions.drain(..settled).next_back() {
        Some((_, Some(sector))) => durable.insert(number, sector),
        Some((_, None)) => durable.remove(&number),
        None => None,
    };
}

fn cut(content: &mut BTreeMap<u64, Rc<[u8; SECTOR as usize]>>, size: u64) {
    content.split_off(&size.div_ceil(SECTOR));
    let rest = (size % SECTOR) as usize;
    if rest > 0
        && let Some(last) = content.get_mut(&(size / SECTOR))
    {
        let mut kept = **last;
        kept[rest..].fill(0);
        *last = Rc::new(kept);
    }
}

/// Which of the writes that no flush covered are left after a crash.
enum Survival {
    Nothing,
    Everything,
    /// Each sector any of its versions.
    AnyVersion,
    /// Each sector its newest version or the durable one, so many of a hundred.
    Share(u64),
    /// A write survives as a whole or not at all; the number decides which.
    WholeWrites(u64),
    /// Only what was written since.
    OnlySince(u64),
    /// Only what was written before.
    OnlyBefore(u64),
}

impl Survival {
    fn draw(random: &mut Random, sequence: u64) -> Survival {
        let moment = sequence.saturating_sub(random.below(sequence.min(40) + 1));
        match random.below(10) {
            0 => Survival::Nothing,
            1 => Survival::Everything,
            2 | 3 => Survival::AnyVersion,
            4 => Survival::Share(1 + random.below(99)),
            5 | 6 => Survival::WholeWrites(random.next_u64()),
            7 | 8 => Survival::OnlySince(moment),
            _ => Survival::OnlyBefore(moment),
        }
    }

    /// The version that is left; `None`: the durable one.
    fn pick<T>(&self, random: &mut Random, versions: &[(u64, T)]) -> Option<usize> {
        let newest = versions.len().checked_sub(1)?;
        let newest_where =
            |holds: &dyn Fn(u64) -> bool| versions.iter().rposition(|(at, _)| holds(*at));
        match self {
            Survival::Nothing => None,
            Survival::Everything => Some(newest),
            Survival::AnyVersion => (random.below(newest as u64 + 2) as usize).checked_sub(1),
            Survival::Share(share) => random.percent(*share).then_some(newest),
            Survival::WholeWrites(number) => {
                newest_where(&|at| Random::new(number ^ at).percent(50))
            }
            Survival::OnlySince(moment) => newest_where(&|at| at >= *moment),
            Survival::OnlyBefore(moment) => newest_where(&|at| at < *moment),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(store: &VolatileStore, offset: u64) -> u8 {
        let mut byte = [0];
        store.read(offset, &mut byte);
        byte[0]
    }

    fn crashes(store: &VolatileStore, offset: u64) -> Vec<u8> {
        let mut random = Random::new(1);
        let mut seen: Vec<u8> = (0..200)
            .map(|_| read(&store.crash(&mut random), offset))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn what_was_flushed_survives_every_crash() {
        let mut store = VolatileStore::from_bytes(&[1; 2048]);
        store.write(512, &[2; 512]);
        store.flush(store.sequence());
        assert_eq!(crashes(&store, 512), [2]);
        assert_eq!(crashes(&store, 0), [1]);
    }

    #[test]
    fn each_version_since_the_flush_may_be_left() {
        let mut store = VolatileStore::from_bytes(&[1; 2048]);
        store.write(512, &[2; 512]);
        store.write(512, &[3; 512]);
        assert_eq!(read(&store, 512), 3);
        assert_eq!(crashes(&store, 512), [1, 2, 3]);
    }

    #[test]
    fn a_flush_covers_only_what_came_before_it() {
        let mut store = VolatileStore::from_bytes(&[1; 2048]);
        store.write(512, &[2; 512]);
        let moment = store.sequence();
        store.write(512, &[3; 512]);
        store.flush(moment);
        assert_eq!(crashes(&store, 512), [2, 3]);
    }

    #[test]
    fn a_durable_range_takes_older_versions_along() {
        let mut store = VolatileStore::from_bytes(&[1; 2048]);
        store.write(0, &[2; 1024]);
        store.write(0, &[3; 512]);
        store.make_durable(0, 512);
        assert_eq!(crashes(&store, 0), [3]);
        assert_eq!(crashes(&store, 512), [1, 2]);
    }

    #[test]
    fn the_size_is_volatile_too() {
        let mut store = VolatileStore::from_bytes(&[1; 1024]);
        store.write(1024, &[2; 100]);
        let mut random = Random::new(2);
        let sizes: Vec<u64> = (0..50).map(|_| store.crash(&mut random).size()).collect();
        assert!(sizes.contains(&1024) && sizes.contains(&1124));
        store.make_durable(1024, 100);
        assert_eq!(store.crash(&mut random).size(), 1124);
    }

    #[test]
    fn shrinking_and_growing_leaves_zeroes() {
        let mut store = VolatileStore::from_bytes(&[1; 2000]);
        store.truncate(700);
        store.truncate(2000);
        assert_eq!(
            (read(&store, 699), read(&store, 700), read(&store, 1999)),
            (1, 0, 0)
        );
    }

    #[test]
    fn extents_follow_sectors() {
        let mut store = VolatileStore::default();
        store.write(1024, &[1; 1024]);
        store.truncate(8192);
        assert_eq!(store.extent(0, 8192), (false, 1024));
        assert_eq!(store.extent(1100, 8192), (true, 2048));
        assert_eq!(store.extent(2048, 8192), (false, 8192));
        assert_eq!(store.extent(1024, 1500), (true, 1500));
    }
}

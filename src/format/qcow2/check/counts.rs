//! References counted per host cluster; memory only where there are any.

use std::collections::{BTreeMap, BTreeSet};

/// Clusters whose counts are kept together.
const CHUNK: u64 = 512;

/// How often each host cluster is in use.
#[derive(Default)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
}

impl Counts {
    /// One more user.
    pub(super) fn add(&mut self, cluster: u64) {
        let chunk = self
            .chunks
            .entry(cluster / CHUNK)
            .or_insert_with(|| Box::new([0; CHUNK as usize]));
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
    }

    /// Users of a cluster.
    pub(super) fn of(&self, cluster: u64) -> u64 {
        self.chunks
            .get(&(cluster / CHUNK))
            .map_or(0, |chunk| u64::from(chunk[(cluster % CHUNK) as usize]))
    }

    /// One past the last cluster in use.
    pub(super) fn end(&self) -> u64 {
        self.chunks.last_key_value().map_or(0, |(index, chunk)| {
            let used = chunk.iter().rposition(|count| *count > 0);
            index * CHUNK + used.map_or(0, |last| last as u64 + 1)
        })
    }

    /// The refcount blocks, of so many entries each, that clusters in use belong to.
    pub(super) fn touched(&self, entries: u64) -> BTreeSet<u64> {
        let blocks = |index: &u64| index * CHUNK / entries..=(index * CHUNK + CHUNK - 1) / entries;
        self.chunks.keys().flat_map(blocks).collect()
    }
}

//! The refcounts that the image stores.

use std::collections::BTreeMap;

use crate::block::Child;
use crate::buffer::MemorySlice;
use crate::error::Result;

use super::super::layout::{Geometry, HostCluster, HostOffset, refcount};

/// Bytes of refcount blocks that are kept in memory.
const CACHE: u64 = 16 << 20;

/// Reads stored refcounts through a small cache.
pub(super) struct StoredRefcounts<'a> {
    file: &'a Child,
    geometry: Geometry,
    /// Valid blocks, by index in the table.
    blocks: BTreeMap<u64, HostOffset>,
    cache: BTreeMap<u64, (u64, Vec<u8>)>,
    uses: u64,
}

impl<'a> StoredRefcounts<'a> {
    pub(super) fn new(file: &'a Child, geometry: Geometry) -> StoredRefcounts<'a> {
        StoredRefcounts {
            file,
            geometry,
            blocks: BTreeMap::new(),
            cache: BTreeMap::new(),
            uses: 0,
        }
    }

    /// A block of the table that can be read.
    pub(super) fn add_block(&mut self, index: u64, offset: HostOffset) {
        self.blocks.insert(index, offset);
    }

    /// Indices of the blocks before `end`.
    pub(super) fn blocks_present(&self, end: u64) -> impl Iterator<Item = u64> {
        self.blocks.range(..end).map(|(index, _)| *index)
    }

    /// Brings a block into the cache; one that is not there holds zeroes.
    pub(super) async fn load(&mut self, index: u64) -> Result<()> {
        self.uses += 1;
        if let Some((used, _)) = self.cache.get_mut(&index) {
            *used = self.uses;
            return Ok(());
        }
        let Some(offset) = self.blocks.get(&index) else {
            return Ok(());
        };
        let block = MemorySlice::zeroed(self.geometry.cluster_size() as usize);
        self.file.read(offset.0, block.clone().into()).await?;
        let most = (CACHE / self.geometry.cluster_size()) as usize;
        while self.cache.len() >= most {
            self.evict();
        }
        self.cache.insert(index, (self.uses, block.to_vec()));
        Ok(())
    }

    fn evict(&mut self) {
        let oldest = self.cache.iter().min_by_key(|(_, (used, _))| *used);
        if let Some(index) = oldest.map(|(index, _)| *index) {
            self.cache.remove(&index);
        }
    }

    /// The refcount of a cluster of a block that was loaded last.
    pub(super) fn in_loaded(&self, index: u64, cluster: HostCluster) -> u64 {
        let entry = self.geometry.refcount_block_index(cluster) as usize;
        self.cache.get(&index).map_or(0, |(_, block)| {
            refcount(block, entry, self.geometry.refcount_order)
        })
    }

    /// The refcount of a cluster.
    pub(super) async fn of(&mut self, cluster: HostCluster) -> Result<u64> {
        let index = cluster.0 >> self.geometry.refcount_block_bits();
        self.load(index).await?;
        Ok(self.in_loaded(index, cluster))
    }
}

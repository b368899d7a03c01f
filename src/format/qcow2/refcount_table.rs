//! New refcount blocks, and a longer refcount table.
//!
//! A new block lies in the first cluster that it covers, where it counts itself. Where the table must
//! grow, the new table and the blocks for it lie in a region that the old table does not cover, and
//! the header names the new table only when all of that is durable.

use crate::block::{DebugEvent, WriteFlags, ZeroFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::allocator::Allocation;
use super::epochs::Freed;
use super::header::invalid;
use super::layout::{self, HostCluster, HostOffset, MAX_REFCOUNT_TABLE_BYTES};
use super::table::{self, Table};

/// Clusters from a table index on that no refcount block covers: blocks first, then space.
#[derive(Clone, Copy, Debug)]
struct Region {
    first: HostCluster,
    blocks: u64,
    space: u64,
}

impl Qcow2 {
    fn block_entries(&self) -> u64 {
        self.geometry.refcount_block_entries()
    }

    /// Gives `cluster`, which no block covers, one: in that very cluster. Answers where to look on.
    pub(super) async fn add_refcount_block(&self, cluster: HostCluster) -> Result<HostCluster> {
        let index = self.geometry.refcount_table_index(cluster);
        if index >= self.refcount_table.borrow().length() {
            self.grow_refcount_table().await?;
            return Ok(cluster);
        }
        self.tell(DebugEvent::RefblockAlloc);
        self.check_not_metadata(cluster, 1).await?;
        self.allocator.touch(cluster, 1);
        let offset = self.geometry.host_offset(cluster);
        self.tell(DebugEvent::RefblockAllocWrite);
        self.zero_cluster(offset).await?;
        self.refcount_table.borrow_mut().set(index, offset.0);
        self.metadata.borrow_mut().insert(cluster, 1);
        let mut slice = vec![0; self.refcounts.slice_size()].into_boxed_slice();
        let position = self.refcount_position(cluster);
        layout::set_refcount(&mut slice, position, self.geometry.refcount_order, 1);
        self.refcounts
            .insert(self.refcount_key(cluster), slice, true, false);
        Ok(cluster.plus(1))
    }

    /// Makes a whole cluster zero, as data where it must be.
    pub(super) async fn zero_cluster(&self, offset: HostOffset) -> Result<()> {
        let range = ByteRange::between(offset.0, offset.0 + self.geometry.cluster_size());
        self.file().write_zeroes(range, ZeroFlags::empty()).await
    }

    /// Space at the end of what blocks cover, for more clusters than a block covers.
    pub(super) async fn allocate_region(&self, count: u64) -> Result<Allocation> {
        loop {
            let covered = {
                let table = self.refcount_table.borrow();
                let used = table.entries().iter().rposition(|entry| *entry != 0);
                used.map_or(0, |index| index as u64 + 1)
            };
            let region = self.region(covered, |_| count);
            let table_length = self.refcount_table.borrow().length() as u64;
            if covered + region.blocks > table_length {
                self.grow_refcount_table().await?;
                continue;
            }
            self.allocator
                .touch(region.first, region.blocks + region.space);
            self.write_blocks(&region).await?;
            for block in 0..region.blocks {
                let cluster = region.first.plus(block);
                let offset = self.geometry.host_offset(cluster);
                let index = (covered + block) as usize;
                self.refcount_table.borrow_mut().set(index, offset.0);
            }
            self.metadata
                .borrow_mut()
                .insert(region.first, region.blocks);
            let first = region.first.plus(region.blocks);
            return Ok(Allocation {
                first,
                count,
                is_zero: false,
            });
        }
    }

    /// Blocks and space from table index `covered` on, where `space` tells how many clusters are
    /// wanted beside so many blocks.
    fn region(&self, covered: u64, space: impl Fn(u64) -> u64) -> Region {
        let mut blocks = 1;
        while blocks * self.block_entries() < blocks + space(blocks) {
            blocks += 1;
        }
        Region {
            first: HostCluster(covered * self.block_entries()),
            blocks,
            space: space(blocks),
        }
    }

    /// Writes the refcount blocks of a region, which count the region's blocks and space.
    async fn write_blocks(&self, region: &Region) -> Result<()> {
        let used = region.blocks + region.space;
        let order = self.geometry.refcount_order;
        for block in 0..region.blocks {
            let mut bytes = vec![0; self.geometry.cluster_size() as usize];
            let first = block * self.block_entries();
            for index in 0..self.block_entries().min(used.saturating_sub(first)) {
                layout::set_refcount(&mut bytes, index as usize, order, 1);
            }
            let offset = self.geometry.host_offset(region.first.plus(block));
            self.tell(DebugEvent::RefblockAllocWriteBlocks);
            self.write_metadata(offset, &bytes).await?;
        }
        Ok(())
    }

    /// Writes metadata where nothing points yet.
    pub(super) async fn write_metadata(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        let payload = Payload::from(MemorySlice::from_bytes(bytes));
        self.file()
            .write(offset.0, payload, WriteFlags::empty())
            .await
    }

    /// Writes metadata to clusters of its own, which are added to `taken`: nothing points to them yet.
    pub(super) async fn write_new_metadata(
        &self,
        taken: &mut Vec<Allocation>,
        bytes: &[u8],
    ) -> Result<HostOffset> {
        let clusters = self.geometry.clusters_for(bytes.len() as u64).0;
        let allocation = self.allocate_contiguous(clusters).await?;
        taken.push(allocation);
        let offset = self.geometry.host_offset(allocation.first);
        let mut padded = bytes.to_vec();
        padded.resize((clusters * self.geometry.cluster_size()) as usize, 0);
        self.write_metadata(offset, &padded).await?;
        Ok(offset)
    }

    /// Under the allocation lock: the table gets half as long again, at least.
    async fn grow_refcount_table(&self) -> Result<()> {
        self.tell(DebugEvent::ReftableGrow);
        self.write_back(true).await?;
        let entries_before = self.refcount_table.borrow().length() as u64;
        let cluster_size = self.geometry.cluster_size();
        let table_clusters = |blocks: u64| {
            let wanted = (entries_before + blocks).max(entries_before + entries_before / 2);
            self.geometry.clusters_for((wanted + 1) * 8).0
        };
        let region = self.region(entries_before, table_clusters);
        if region.space * cluster_size > MAX_REFCOUNT_TABLE_BYTES {
            return Err(invalid("Reference count table too large"));
        }
        self.allocator
            .touch(region.first, region.blocks + region.space);
        self.write_blocks(&region).await?;
        let offset = self.geometry.host_offset(region.first.plus(region.blocks));
        let mut entries = self.refcount_table.borrow().entries().to_vec();
        let blocks = (0..region.blocks).map(|block| region.first.plus(block));
        entries.extend(blocks.map(|block| self.geometry.host_offset(block).0));
        entries.resize((region.space * cluster_size / 8) as usize, 0);
        self.tell(DebugEvent::RefblockAllocWriteTable);
        self.write_metadata(offset, &table::serialise(&entries))
            .await?;
        self.barrier().await?;
        let before = self.header.borrow().refcount_table_offset;
        self.tell(DebugEvent::RefblockAllocSwitchTable);
        self.update_header(|header| {
            header.refcount_table_offset = offset;
            header.refcount_table_clusters = region.space as u32;
        })
        .await?;
        self.refcount_table.replace(Table::new(entries));
        let used = region.blocks + region.space;
        self.metadata.borrow_mut().insert(region.first, used);
        self.forget_metadata(before, entries_before * 8);
        Ok(())
    }

    /// A table that nothing on disk names any more becomes free.
    pub(super) fn forget_metadata(&self, offset: HostOffset, bytes: u64) {
        let end = offset.0 + self.geometry.clusters_for(bytes).0 * self.geometry.cluster_size();
        let range = ByteRange::between(offset.0, end);
        self.epochs.seal(vec![Freed {
            range,
            discard: true,
        }]);
    }
}

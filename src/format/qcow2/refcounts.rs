//! Refcounts of host clusters, through the cache of refcount block slices.

use crate::block::DebugEvent;
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, ErrorKind, Result};

use super::Qcow2;
use super::layout::{self, HostCluster, HostOffset, RefcountTableEntry};

impl Qcow2 {
    /// Log2 of the refcounts in a slice of a refcount block.
    pub(super) fn refcount_slice_bits(&self) -> u32 {
        self.refcounts.slice_size().ilog2() + 3 - self.geometry.refcount_order
    }

    /// The slice that has a host cluster's refcount.
    pub(super) fn refcount_key(&self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refcount_slice_bits()
    }

    /// Which refcount of its slice a host cluster has.
    pub(super) fn refcount_position(&self, cluster: HostCluster) -> usize {
        (cluster.0 & ((1 << self.refcount_slice_bits()) - 1)) as usize
    }

    /// The refcount block that covers a host cluster.
    pub(super) fn refcount_block(&self, cluster: HostCluster) -> Option<HostOffset> {
        let index = self.geometry.refcount_table_index(cluster);
        RefcountTableEntry(self.refcount_table.borrow().entry(index)).offset()
    }

    /// Where a slice lies in the file; `None` where there is no refcount block.
    pub(super) fn refcount_slice_offset(&self, key: u64) -> Option<HostOffset> {
        let cluster = HostCluster(key << self.refcount_slice_bits());
        let block = self.refcount_block(cluster)?;
        let bits = self.geometry.refcount_block_index(cluster) << self.geometry.refcount_order;
        Some(block.plus(bits / 8))
    }

    /// Brings the slice of a host cluster's refcount into the cache; false where there is no block.
    pub(super) async fn load_refcount(&self, cluster: HostCluster) -> Result<bool> {
        let key = self.refcount_key(cluster);
        loop {
            if self.refcounts.contains(key) {
                return Ok(true);
            }
            if self.refcounts.is_congested() {
                self.write_back(false).await?;
            }
            let Some(_loading) = self.refcounts.begin_load(key).await else {
                continue;
            };
            let Some(offset) = self.refcount_slice_offset(key) else {
                return Ok(false);
            };
            let length = self.refcounts.slice_size();
            self.tell(DebugEvent::RefblockLoad);
            let bytes = self.read_metadata(offset, length).await?;
            self.refcounts.insert(key, bytes.into(), false, false);
        }
    }

    /// The refcount of a cluster whose slice is in the cache.
    pub(super) fn cached_refcount(&self, cluster: HostCluster) -> u64 {
        let (key, position) = (self.refcount_key(cluster), self.refcount_position(cluster));
        let order = self.geometry.refcount_order;
        match self
            .refcounts
            .with(key, |slice, _| layout::refcount(slice, position, order))
        {
            Some(refcount) => refcount,
            None => unreachable!("the slice of {cluster:?} was loaded"),
        }
    }

    /// Sets the refcount of a cluster whose slice is in the cache.
    pub(super) fn set_cached_refcount(&self, cluster: HostCluster, refcount: u64) {
        let (key, position) = (self.refcount_key(cluster), self.refcount_position(cluster));
        let order = self.geometry.refcount_order;
        self.refcounts.change(key, |slice| {
            layout::set_refcount(slice, position, order, refcount)
        });
    }

    /// The refcount of a host cluster.
    pub(super) async fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        match self.load_refcount(cluster).await? {
            true => Ok(self.cached_refcount(cluster)),
            false => Ok(0),
        }
    }

    /// Takes one reference away; true where none is left. Under the allocation lock.
    pub(super) async fn drop_reference(&self, cluster: HostCluster) -> Result<bool> {
        let refcount = self.refcount(cluster).await?;
        if refcount == 0 {
            let offset = self.geometry.host_offset(cluster);
            let message = format!("Refcount of cluster at offset {offset} is 0, but it was in use");
            let error = Error::new(ErrorKind::Corrupt, message);
            return Err(self.report_corruption(error).await);
        }
        self.set_cached_refcount(cluster, refcount - 1);
        Ok(refcount == 1)
    }

    /// Reads `length` bytes of metadata.
    pub(super) async fn read_metadata(&self, offset: HostOffset, length: usize) -> Result<Vec<u8>> {
        let buffer = MemorySlice::zeroed(length);
        self.file()
            .read(offset.0, Payload::from(buffer.clone()))
            .await?;
        Ok(buffer.to_vec())
    }
}

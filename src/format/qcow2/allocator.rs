//! Taking host clusters and giving them back.

use std::cell::Cell;

use crate::block::DebugEvent;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::Qcow2;
use super::epochs::Freed;
use super::layout::{self, HostCluster, HostOffset};
use super::turn::Turn;

/// Where free clusters are looked for.
#[derive(Default)]
pub(super) struct Allocator {
    /// Held by who changes refcounts or the refcount table.
    pub(super) turn: Turn,
    /// No cluster before this one is free.
    pub(super) first_free: Cell<u64>,
    /// From this cluster on the file was never written and reads as zeroes.
    pub(super) untouched: Cell<u64>,
    /// Where the next compressed bytes go: the rest of a cluster that has some.
    pub(super) tail: Cell<Option<HostOffset>>,
}

impl Allocator {
    /// Clusters that are about to be written. Answers whether they read as zeroes until then.
    pub(super) fn touch(&self, first: HostCluster, count: u64) -> bool {
        let before = self.untouched.get();
        self.untouched.set(before.max(first.0 + count));
        first.0 >= before
    }
}

/// New clusters, refcount 1, contiguous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allocation {
    pub(super) first: HostCluster,
    pub(super) count: u64,
    /// They read as zeroes.
    pub(super) is_zero: bool,
}

impl Qcow2 {
    /// Takes up to `most` contiguous clusters, at least one. They are nobody else's from now on; a
    /// crash before they are mapped leaks them.
    pub(super) async fn allocate(&self, most: u64) -> Result<Allocation> {
        let _turn = self.allocator.turn.take().await;
        self.reclaim().await;
        self.tell(DebugEvent::ClusterAlloc);
        let first = self
            .find_free(HostCluster(self.allocator.first_free.get()))
            .await?;
        let count = self.free_run(first, most).await?;
        let allocation = self.take_clusters(first, count).await?;
        self.allocator.first_free.set(first.0 + count);
        Ok(allocation)
    }

    /// Takes `count` contiguous clusters.
    pub(super) async fn allocate_contiguous(&self, count: u64) -> Result<Allocation> {
        let _turn = self.allocator.turn.take().await;
        self.reclaim().await;
        self.tell(DebugEvent::ClusterAlloc);
        if count + 1 >= self.geometry.refcount_block_entries() {
            return self.allocate_region(count).await;
        }
        let mut start = HostCluster(self.allocator.first_free.get());
        loop {
            let first = self.find_free(start).await?;
            let found = self.free_run(first, count).await?;
            if found == count {
                return self.take_clusters(first, count).await;
            }
            start = first.plus(found);
        }
    }

    /// Gives clusters back that were allocated and never mapped; no I/O to them is in flight. What
    /// cannot be given back is leaked.
    pub(super) async fn release(&self, allocation: Allocation) {
        let _turn = self.allocator.turn.take().await;
        for cluster in allocation.first.0..allocation.first.0 + allocation.count {
            if let Err(error) = self.free_cluster(HostCluster(cluster)).await {
                tracing::warn!(node = self.node_name, cluster, %error, "cluster is leaked");
            }
        }
    }

    /// Takes references away whose mappings are gone for good. Under the allocation lock. What cannot
    /// be freed is leaked.
    pub(super) async fn reclaim(&self) {
        while let Some(batch) = self.epochs.take_quiet() {
            let mut discards = Discards::default();
            for freed in batch {
                if let Err(error) = self.reclaim_one(&freed, &mut discards).await {
                    let range = freed.range;
                    tracing::warn!(node = self.node_name, %range, %error, "clusters are leaked");
                }
            }
            for range in discards.ranges {
                if let Err(error) = self.file().discard(range).await {
                    tracing::debug!(node = self.node_name, %range, %error, "discard failed");
                }
            }
        }
    }

    async fn reclaim_one(&self, freed: &Freed, discards: &mut Discards) -> Result<()> {
        let clusters = freed.range.align_outward(self.geometry.cluster_size());
        let mut offset = clusters.start();
        self.tell(DebugEvent::ClusterFree);
        while offset < clusters.end() {
            let cluster = self.geometry.host_cluster(HostOffset(offset));
            let next = offset + self.geometry.cluster_size();
            if self.free_cluster(cluster).await? && freed.discard && self.pass_discard.get() {
                discards.add(ByteRange::between(offset, next));
            }
            offset = next;
        }
        Ok(())
    }

    /// Takes a reference away; true where the cluster is free now.
    async fn free_cluster(&self, cluster: HostCluster) -> Result<bool> {
        let is_free = self.drop_reference(cluster).await?;
        if is_free {
            self.metadata.borrow_mut().remove(cluster);
            let first_free = self.allocator.first_free.get().min(cluster.0);
            self.allocator.first_free.set(first_free);
            let tail = self.allocator.tail.get();
            if tail.is_some_and(|tail| self.geometry.host_cluster(tail) == cluster) {
                self.allocator.tail.set(None);
            }
        }
        Ok(is_free)
    }

    /// Takes references away that no mapping has ever had. Under the allocation lock.
    pub(super) async fn give_back(&self, freed: &Freed) -> Result<()> {
        self.reclaim_one(freed, &mut Discards::default()).await
    }

    /// The first free cluster from `start` on that has a refcount block.
    pub(super) async fn find_free(&self, start: HostCluster) -> Result<HostCluster> {
        let mut cluster = start;
        loop {
            self.check_address(cluster)?;
            if self.load_refcount(cluster).await? {
                match self.free_in_slice(cluster) {
                    Some(free) => return Ok(free),
                    None => cluster = HostCluster(self.slice_end(cluster)),
                }
            } else {
                cluster = self.add_refcount_block(cluster).await?;
            }
        }
    }

    fn check_address(&self, cluster: HostCluster) -> Result<()> {
        if cluster.0 < 1 << (56 - self.geometry.cluster_bits) {
            return Ok(());
        }
        let message = "Image file is as large as the format allows";
        Err(Error::new(ErrorKind::NoSpace, message))
    }

    fn slice_end(&self, cluster: HostCluster) -> u64 {
        (self.refcount_key(cluster) + 1) << self.refcount_slice_bits()
    }

    fn free_in_slice(&self, start: HostCluster) -> Option<HostCluster> {
        let from = self.refcount_position(start);
        let order = self.geometry.refcount_order;
        let end = 1usize << self.refcount_slice_bits();
        let found = self.refcounts.with(self.refcount_key(start), |slice, _| {
            (from..end).find(|index| layout::refcount(slice, *index, order) == 0)
        });
        found?.map(|index| start.plus((index - from) as u64))
    }

    /// Free clusters from `first`, which is free, on; at most `most`, and none without a block.
    async fn free_run(&self, first: HostCluster, most: u64) -> Result<u64> {
        let mut count = 1;
        while count < most {
            let next = first.plus(count);
            let is_free = self.load_refcount(next).await? && self.cached_refcount(next) == 0;
            if !is_free || self.check_address(next).is_err() {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    pub(super) async fn take_clusters(&self, first: HostCluster, count: u64) -> Result<Allocation> {
        self.check_not_metadata(first, count).await?;
        for cluster in first.0..first.0 + count {
            let cluster = HostCluster(cluster);
            self.load_refcount(cluster).await?;
            self.set_cached_refcount(cluster, 1);
        }
        let is_zero = self.allocator.touch(first, count);
        Ok(Allocation {
            first,
            count,
            is_zero,
        })
    }

    /// A free cluster that holds metadata: the refcounts are wrong.
    pub(super) async fn check_not_metadata(&self, first: HostCluster, count: u64) -> Result<()> {
        let clusters = first.0..first.0 + count;
        let taken = {
            let metadata = self.metadata.borrow();
            clusters
                .map(HostCluster)
                .find(|cluster| metadata.contains(*cluster))
        };
        let Some(cluster) = taken else {
            return Ok(());
        };
        let offset = self.geometry.host_offset(cluster);
        let message =
            format!("Preventing invalid allocation of metadata cluster at offset {offset}");
        Err(self
            .report_corruption(Error::new(ErrorKind::Corrupt, message))
            .await)
    }
}

/// Discards of adjacent clusters as one.
#[derive(Default)]
struct Discards {
    ranges: Vec<ByteRange>,
}

impl Discards {
    fn add(&mut self, range: ByteRange) {
        match self.ranges.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = ByteRange::between(last.start(), range.end());
            }
            _ => self.ranges.push(range),
        }
    }
}

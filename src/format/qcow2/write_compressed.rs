//! Writing guest clusters compressed: each by itself, several at a time, where there are threads for it.
//!
//! Compressed clusters lie one behind the other, also within a host cluster, whose refcount says how many
//! of them touch it. They are never written in place: a cluster that is written again gets another place.

use crate::block::{LockMode, WriteFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::compress::compress;
use super::entry::L2Entry;
use super::epochs::Freed;
use super::join::{Piece, join_some};
use super::layout::{GuestOffset, HostCluster, HostOffset};
use super::lookup::Purpose;

/// Clusters of one request in flight.
const MOST_IN_FLIGHT: usize = 16;

impl Qcow2 {
    /// Writes whole clusters (the disk's last may be shorter), each compressed where that makes it shorter.
    /// Other writes are as any.
    pub(super) async fn write_guest_compressed(&self, offset: u64, payload: Payload) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        let is_whole = |end: u64| end.is_multiple_of(cluster_size) || end == self.size.get();
        if !offset.is_multiple_of(cluster_size) || !is_whole(range.end()) {
            return self.write_guest(offset, payload).await;
        }
        self.prepare_write().await?;
        let starts = (range.start()..range.end()).step_by(cluster_size as usize);
        let pieces = starts.map(|start| {
            let end = range.end().min(start + cluster_size);
            let at = (start - range.start()) as usize;
            let part = payload.slice(at, (end - start) as usize);
            Box::pin(self.write_cluster_compressed(start, part)) as Piece<'_>
        });
        join_some(pieces, MOST_IN_FLIGHT).await
    }

    async fn write_cluster_compressed(&self, start: u64, payload: Payload) -> Result<()> {
        let mut cluster = payload.to_memory()?.to_vec();
        cluster.resize(self.geometry.cluster_size() as usize, 0);
        let kind = self.header.borrow().compression;
        let compressed = match &self.helpers {
            Some(helpers) => helpers.blocking(move || compress(kind, &cluster)).await,
            None => compress(kind, &cluster),
        };
        match compressed? {
            Some(data) => self.store_compressed(start, &data).await,
            None => self.write_guest(start, payload).await,
        }
    }

    async fn store_compressed(&self, start: u64, data: &[u8]) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let whole = ByteRange::between(start, start + cluster_size);
        let _held = self.clusters.lock(whole, LockMode::Exclusive).await;
        let (before, guard) = self.find(whole, Purpose::Write).await?;
        drop(guard);
        let guest = self.geometry.guest_cluster(GuestOffset(start));
        self.own_l2_table(self.geometry.l1_index(guest)).await?;
        let length = data.len() as u64;
        let place = self.allocate_bytes(length).await?;
        let written = self.fill_and_map(start, place, data).await;
        if let Err(error) = written {
            let range = ByteRange::between(place.0, place.0 + length);
            self.release_bytes(range).await;
            return Err(error);
        }
        self.unmap(before.mapping, 1, false);
        Ok(())
    }

    async fn fill_and_map(&self, start: u64, place: HostOffset, data: &[u8]) -> Result<()> {
        let bytes = MemorySlice::from_bytes(data);
        let empty = WriteFlags::empty();
        self.file().write(place.0, bytes.into(), empty).await?;
        self.hold_l2(start).await?;
        self.check_health()?;
        let guest = self.geometry.guest_cluster(GuestOffset(start));
        let entry = L2Entry::compressed_at(&self.geometry, place, data.len() as u64);
        self.l2.change(self.l2_key(guest), |slice| {
            let position = self.l2_position(guest);
            slice[position..][..8].copy_from_slice(&entry.0.to_be_bytes());
        });
        self.progress.changed(true);
        Ok(())
    }

    /// Takes `length` bytes, not more than a cluster, behind those that were taken last where they fit.
    async fn allocate_bytes(&self, length: u64) -> Result<HostOffset> {
        let _turn = self.allocator.turn.take().await;
        self.reclaim().await;
        if let Some(place) = self.append_bytes(length).await? {
            return Ok(place);
        }
        let first_free = HostCluster(self.allocator.first_free.get());
        let first = self.find_free(first_free).await?;
        self.take_clusters(first, 1).await?;
        self.allocator.first_free.set(first.0 + 1);
        let place = self.geometry.host_offset(first);
        self.set_tail(place, length);
        Ok(place)
    }

    /// In the rest of the cluster that was begun, and in the next one where that is free.
    async fn append_bytes(&self, length: u64) -> Result<Option<HostOffset>> {
        let Some(place) = self.allocator.tail.get() else {
            return Ok(None);
        };
        let cluster = self.geometry.host_cluster(place);
        let next = cluster.plus(1);
        let refcount = self.refcount(cluster).await?;
        let spans = place.0 + length > self.geometry.host_offset(next).0;
        let fits = L2Entry::holds_compressed(&self.geometry, place, length);
        if refcount == 0 || refcount == self.geometry.refcount_max() || !fits {
            return Ok(None);
        }
        if spans {
            let is_free = self.load_refcount(next).await? && self.cached_refcount(next) == 0;
            if !is_free {
                return Ok(None);
            }
            self.take_clusters(next, 1).await?;
            if self.allocator.first_free.get() == next.0 {
                self.allocator.first_free.set(next.0 + 1);
            }
            self.load_refcount(cluster).await?;
        }
        self.set_cached_refcount(cluster, refcount + 1);
        self.set_tail(place, length);
        Ok(Some(place))
    }

    /// The bytes from `place` on are taken; what follows them in their cluster is free.
    fn set_tail(&self, place: HostOffset, length: u64) {
        let end = place.plus(length);
        let is_begun = self.geometry.in_cluster(end.0) != 0;
        self.allocator.tail.set(is_begun.then_some(end));
    }

    /// Gives bytes back that were never mapped. What cannot be given back is leaked.
    async fn release_bytes(&self, range: ByteRange) {
        let _turn = self.allocator.turn.take().await;
        let freed = Freed {
            range,
            discard: false,
        };
        if let Err(error) = self.give_back(&freed).await {
            tracing::warn!(node = self.node_name, %range, %error, "clusters are leaked");
        }
    }
}

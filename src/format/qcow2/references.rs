//! What an L1 table refers to, counted in refcounts and told by COPIED flags.
//!
//! Every L1 table, that of the disk and those of internal snapshots, counts for itself: an L2 table that two
//! of them name has refcount 2, and so have the clusters that it names. Here tables are read from the file and
//! written to it past the cache: the caller has written out all that was dirty, and no request is in flight.
//!
//! A COPIED flag that is missing costs a copy, one that should not be there costs a snapshot. So flags go before
//! refcounts rise, and come after they have fallen, durably each.

use crate::block::DebugEvent;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::Qcow2;
use super::epochs::Freed;
use super::layout::{HostCluster, HostOffset, L1Entry, L2Entry, Mapping};
use super::table::{self, Table, big_endian};

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Qcow2 {
    /// The L2 table here, as entries.
    async fn read_l2_table(&self, offset: HostOffset) -> Result<Vec<u64>> {
        if self.geometry.in_cluster(offset.0) != 0 {
            let error = corrupt(format!("L2 table offset {offset} unaligned"));
            return Err(self.report_corruption(error).await);
        }
        self.tell(DebugEvent::L2Load);
        let length = self.geometry.cluster_size() as usize;
        let bytes = self.read_metadata(offset, length).await?;
        Ok(bytes.chunks_exact(8).map(big_endian).collect())
    }

    /// Host clusters that a table refers to, itself among them; several times where it does so.
    async fn references_of(&self, table: HostOffset) -> Result<Vec<HostCluster>> {
        let mut references = vec![self.geometry.host_cluster(table)];
        for entry in self.read_l2_table(table).await? {
            match L2Entry(entry).mapping(&self.geometry) {
                Mapping::Unallocated | Mapping::Zero => {}
                Mapping::Data(host) | Mapping::ZeroAllocated(host) => {
                    self.check_data_place(host).await?;
                    references.push(self.geometry.host_cluster(host));
                }
                Mapping::Compressed(extent) => {
                    let clusters = extent.sectors().align_outward(self.geometry.cluster_size());
                    let bits = self.geometry.cluster_bits;
                    let numbers = clusters.start() >> bits..clusters.end() >> bits;
                    references.extend(numbers.map(HostCluster));
                }
            }
        }
        Ok(references)
    }

    async fn check_data_place(&self, host: HostOffset) -> Result<()> {
        let is_metadata = self
            .metadata
            .borrow()
            .contains(self.geometry.host_cluster(host));
        if self.geometry.in_cluster(host.0) == 0 && !is_metadata {
            return Ok(());
        }
        let error = corrupt(format!(
            "Cluster allocation offset {host} is unaligned or metadata"
        ));
        Err(self.report_corruption(error).await)
    }

    /// Adds a reference to every cluster that an L1 table refers to. `added` counts those that have got it,
    /// also when it fails.
    ///
    /// # Errors
    /// A refcount is as large as it can be; metadata is wrong or cannot be read.
    pub(super) async fn add_references(&self, l1: &[u64], added: &mut u64) -> Result<()> {
        let _turn = self.allocator.turn.take().await;
        for table in tables_of(l1) {
            for cluster in self.references_of(table).await? {
                let refcount = self.refcount(cluster).await?;
                self.check_countable(cluster, refcount).await?;
                self.set_cached_refcount(cluster, refcount + 1);
                *added += 1;
            }
        }
        Ok(())
    }

    async fn check_countable(&self, cluster: HostCluster, refcount: u64) -> Result<()> {
        let offset = self.geometry.host_offset(cluster);
        if refcount == 0 {
            let message = format!("Refcount of cluster at offset {offset} is 0, but it is in use");
            return Err(self.report_corruption(corrupt(message)).await);
        }
        if refcount == self.geometry.refcount_max() {
            let bits = self.geometry.refcount_bits();
            return Err(Error::refused(format!(
                "The image's refcounts of {bits} bits cannot count another reference to the cluster at {offset}"
            )));
        }
        Ok(())
    }

    /// Takes a reference from the clusters that an L1 table refers to, from the first `count` of them in the
    /// order in which they were added. Nothing on disk relies on them. What cannot be read is leaked.
    pub(super) async fn drop_references(&self, l1: &[u64], count: u64) {
        let mut left = count;
        for table in tables_of(l1) {
            let mut clusters = match self.references_of(table).await {
                Ok(clusters) => clusters,
                Err(error) => {
                    tracing::warn!(node = self.node_name, %table, %error, "clusters are leaked");
                    return;
                }
            };
            clusters.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= clusters.len() as u64;
            let cluster_size = self.geometry.cluster_size();
            let freed = clusters.into_iter().map(|cluster| {
                let start = self.geometry.host_offset(cluster).0;
                Freed {
                    range: ByteRange::between(start, start + cluster_size),
                    discard: true,
                }
            });
            self.epochs.seal(freed.collect());
            self.reclaim_quiet().await;
            if left == 0 {
                return;
            }
        }
    }

    /// Takes the COPIED flags from all that an L1 table refers to, in the file. The table itself is the caller's.
    pub(super) async fn clear_copied(&self, l1: &[u64]) -> Result<()> {
        for table in tables_of(l1) {
            let entries = self.read_l2_table(table).await?;
            let clear = entries
                .iter()
                .map(|entry| L2Entry(*entry).with_copied(false).0);
            self.write_l2_table(table, &entries, clear.collect())
                .await?;
        }
        Ok(())
    }

    /// Gives the disk's L1 table and all that it refers to the COPIED flags that refcounts, which are durable, allow.
    pub(super) async fn restore_copied(&self) -> Result<()> {
        let mut l1 = self.l1.borrow().entries().to_vec();
        for entry in &mut l1 {
            let Some(table) = L1Entry(*entry).offset() else {
                continue;
            };
            let is_own = self.refcount(self.geometry.host_cluster(table)).await? == 1;
            *entry = L1Entry(*entry).with_copied(is_own).0;
            if is_own {
                self.restore_in_table(table).await?;
            }
        }
        self.replace_l1(l1).await
    }

    async fn restore_in_table(&self, table: HostOffset) -> Result<()> {
        let entries = self.read_l2_table(table).await?;
        let mut right = entries.clone();
        for entry in &mut right {
            let mapping = L2Entry(*entry).mapping(&self.geometry);
            if let Some(host) = mapping.host_offset() {
                let is_own = self.refcount(self.geometry.host_cluster(host)).await? == 1;
                *entry = L2Entry(*entry).with_copied(is_own).0;
            }
        }
        self.write_l2_table(table, &entries, right).await
    }

    async fn write_l2_table(&self, table: HostOffset, before: &[u64], now: Vec<u64>) -> Result<()> {
        if before == now {
            return Ok(());
        }
        self.tell(DebugEvent::L2Update);
        self.write_metadata(table, &table::serialise(&now)).await
    }

    /// Writes the disk's L1 table in its place, where it differs. What was cached of L2 tables is forgotten.
    pub(super) async fn replace_l1(&self, l1: Vec<u64>) -> Result<()> {
        self.l2.forget(0..u64::MAX);
        if self.l1.borrow().entries() == l1 {
            return Ok(());
        }
        let bytes = table::serialise(&l1);
        self.l1.replace(Table::new(l1));
        let offset = self.header.borrow().l1_offset;
        self.tell(DebugEvent::L1Update);
        self.write_metadata(offset, &bytes).await
    }
}

/// The entries without COPIED flags.
pub(super) fn without_copied(l1: &[u64]) -> Vec<u64> {
    l1.iter()
        .map(|entry| L1Entry(*entry).with_copied(false).0)
        .collect()
}

fn tables_of(l1: &[u64]) -> impl Iterator<Item = HostOffset> {
    l1.iter().filter_map(|entry| L1Entry(*entry).offset())
}

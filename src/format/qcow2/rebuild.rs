//! Refcounts of an image that is marked dirty: counted anew from the tables.
//!
//! Whoever set the mark wrote mappings before refcounts. Nothing is freed that an extension unknown
//! here may use. The mark goes when the new refcounts are durable.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::Qcow2;
use super::header::Incompatible;
use super::layout::{GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, RefcountTableEntry};
use super::lookup::Purpose;
use super::table::big_endian;

/// References to host clusters.
type References = BTreeMap<u64, u64>;

fn refuse(reason: impl std::fmt::Display) -> Error {
    let message = format!("Image is dirty and cannot be opened read/write: {reason}");
    Error::new(ErrorKind::InvalidImage, message)
}

impl Qcow2 {
    /// Makes refcounts right and removes the dirty mark.
    pub(super) async fn rebuild_refcounts(&self) -> Result<()> {
        if self.header.borrow().snapshots > 0 {
            return Err(refuse("it has internal snapshots"));
        }
        tracing::info!(node = self.node_name, "image is dirty: counting references");
        let mut references = self.count_references().await?;
        let turn = self.allocator.turn.take().await;
        self.cover_references(&mut references).await?;
        for (cluster, count) in &references {
            let cluster = HostCluster(*cluster);
            if *count > self.geometry.refcount_max() {
                return Err(refuse(format!("{count} references to {cluster:?}")));
            }
            if self.refcount(cluster).await? != *count {
                self.set_cached_refcount(cluster, *count);
            }
        }
        if self.header.borrow().extensions.is_empty() {
            self.drop_unreferenced(&references).await?;
        }
        drop(turn);
        self.write_back(true).await?;
        self.update_header(|header| header.incompatible -= Incompatible::DIRTY)
            .await
    }

    async fn count_references(&self) -> Result<References> {
        let mut references = References::new();
        let (l1, l1_bytes, table, table_clusters) = {
            let header = self.header.borrow();
            let bytes = u64::from(header.l1_entries) * 8;
            let table = header.refcount_table_offset;
            (
                header.l1_offset,
                bytes,
                table,
                u64::from(header.refcount_table_clusters),
            )
        };
        self.refer(&mut references, HostOffset(0), 1);
        self.refer(&mut references, l1, l1_bytes);
        let table_bytes = table_clusters << self.geometry.cluster_bits;
        self.refer(&mut references, table, table_bytes);
        for entry in self.refcount_table.borrow().entries() {
            if let Some(offset) = RefcountTableEntry(*entry).offset() {
                self.refer(&mut references, offset, 1);
            }
        }
        for (offset, bytes) in Box::pin(self.bitmap_places()).await {
            self.refer(&mut references, offset, bytes);
        }
        let entries = self.l1.borrow().entries().to_vec();
        for (index, entry) in entries.into_iter().enumerate() {
            if let Some(offset) = L1Entry(entry).offset() {
                self.refer(&mut references, offset, 1);
                self.count_table(&mut references, index, offset).await?;
            }
        }
        Ok(references)
    }

    fn refer(&self, references: &mut References, offset: HostOffset, bytes: u64) {
        let range = ByteRange::between(offset.0, offset.0 + bytes);
        let clusters = range.align_outward(self.geometry.cluster_size());
        let bits = self.geometry.cluster_bits;
        for cluster in clusters.start() >> bits..clusters.end() >> bits {
            *references.entry(cluster).or_default() += 1;
        }
    }

    async fn count_table(
        &self,
        references: &mut References,
        index: usize,
        offset: HostOffset,
    ) -> Result<()> {
        let length = self.geometry.cluster_size() as usize;
        let bytes = self.read_metadata(offset, length).await?;
        let first = index as u64 * self.geometry.l2_entries();
        for (number, entry) in bytes.chunks_exact(8).enumerate() {
            let entry = L2Entry(big_endian(entry));
            let cluster = GuestCluster(first + number as u64);
            if let Some(fault) = self.entry_fault(entry, cluster, Purpose::Write) {
                return Err(refuse(fault));
            }
            match entry.mapping(&self.geometry) {
                super::layout::Mapping::Compressed(extent) => {
                    let sectors = extent.sectors();
                    let start = HostOffset(sectors.start());
                    self.refer(references, start, sectors.length());
                }
                mapping => {
                    if let Some(host) = mapping.host_offset() {
                        self.refer(references, host, 1);
                        self.check_copied(references, entry, host)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_copied(
        &self,
        references: &References,
        entry: L2Entry,
        host: HostOffset,
    ) -> Result<()> {
        let cluster = self.geometry.host_cluster(host).0;
        let shared = references.get(&cluster).is_some_and(|count| *count > 1);
        if shared && entry.is_copied() {
            return Err(refuse(format!("cluster at offset {host} is in use twice")));
        }
        Ok(())
    }

    /// Every referenced cluster gets a refcount block.
    async fn cover_references(&self, references: &mut References) -> Result<()> {
        let bits = self.geometry.refcount_block_bits();
        let clusters: Vec<u64> = references.keys().copied().collect();
        for cluster in clusters {
            let cluster = HostCluster(cluster);
            let index = self.geometry.refcount_table_index(cluster);
            if index >= self.refcount_table.borrow().length() {
                return Err(refuse(format!(
                    "the refcount table does not cover {cluster:?}"
                )));
            }
            if self.refcount_block(cluster).is_some() {
                continue;
            }
            let first = cluster.0 >> bits << bits;
            let mut places = first..first + (1 << bits);
            let Some(free) = places.find(|place| !references.contains_key(place)) else {
                return Err(refuse("there is no place for a refcount block"));
            };
            self.add_refcount_block(HostCluster(free)).await?;
            references.insert(free, 1);
        }
        Ok(())
    }

    async fn drop_unreferenced(&self, references: &References) -> Result<()> {
        let blocks = self.refcount_table.borrow().entries().to_vec();
        let entries = self.geometry.refcount_block_entries();
        for (index, entry) in blocks.into_iter().enumerate() {
            if RefcountTableEntry(entry).offset().is_none() {
                continue;
            }
            let first = index as u64 * entries;
            for cluster in first..first + entries {
                if !references.contains_key(&cluster)
                    && self.refcount(HostCluster(cluster)).await? != 0
                {
                    self.set_cached_refcount(HostCluster(cluster), 0);
                }
            }
        }
        Ok(())
    }
}

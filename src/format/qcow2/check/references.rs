//! Walks all metadata of an image and counts what it refers to.

use crate::range::align_up;

use super::super::layout::{
    CompressedExtent, HostCluster, HostOffset, L1Entry, L2Entry, MAX_L1_BYTES, Mapping,
    RefcountTableEntry,
};
use super::{Check, FindingKind};

/// Bytes of the fixed part of an entry of the snapshot table.
const SNAPSHOT_ENTRY: u64 = 40;
/// Bytes of extra data, name and id that an entry of the snapshot table may have.
const MAX_SNAPSHOT_REST: u64 = 1024 + 2 * 65536;

/// Which L1 table: the COPIED flags of inactive ones say nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Active,
    Snapshot,
}

impl Check<'_> {
    /// Counts every reference that there is.
    pub(super) async fn count_references(&mut self) {
        let cluster_size = self.header.geometry.cluster_size();
        self.refer("header", 0, cluster_size);
        self.walk_refcount_table().await;
        let (offset, entries) = (self.header.l1_offset, u64::from(self.header.l1_entries));
        self.walk_l1(Table::Active, offset, entries).await;
        self.walk_snapshots().await;
        self.walk_bitmaps().await;
    }

    async fn walk_refcount_table(&mut self) {
        let geometry = self.header.geometry;
        let offset = self.header.refcount_table_offset.0;
        let clusters = u64::from(self.header.refcount_table_clusters);
        let bytes = clusters * geometry.cluster_size();
        self.refer("refcount table", offset, bytes);
        let Some(entries) = self.read_words("refcount table", offset, bytes / 8).await else {
            return;
        };
        for (index, entry) in entries.into_iter().enumerate() {
            if let Some(block) = RefcountTableEntry(entry).offset() {
                self.count_refcount_block(index as u64, block);
            }
            let reserved = RefcountTableEntry(entry).reserved();
            if reserved != 0 {
                self.result.corruption(format!(
                    "ERROR refcount table entry {index} has reserved bits {reserved:#x}"
                ));
            }
        }
    }

    fn count_refcount_block(&mut self, index: u64, block: HostOffset) {
        let geometry = self.header.geometry;
        if geometry.in_cluster(block.0) != 0 {
            self.result.corruption(format!(
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ));
            return;
        }
        let cluster = geometry.host_cluster(block);
        if cluster.0 >= self.clusters_in_file() {
            self.result
                .corruption(format!("ERROR refcount block {index} is outside image"));
            return;
        }
        self.refer("refcount block", block.0, geometry.cluster_size());
        let users = self.counts.of(cluster.0);
        if users != 1 {
            self.result
                .corruption(format!("ERROR refcount block {index} refcount={users}"));
        }
        self.stored.add_block(index, block);
    }

    async fn walk_l1(&mut self, table: Table, offset: HostOffset, entries: u64) {
        let geometry = self.header.geometry;
        self.refer("L1 table", offset.0, entries * 8);
        let Some(entries) = self.read_words("L1 table", offset.0, entries).await else {
            return;
        };
        for (index, entry) in entries.into_iter().map(L1Entry).enumerate() {
            if entry.reserved() != 0 {
                self.result.corruption(format!(
                    "ERROR found L1 entry with reserved bits set: {:#x}",
                    entry.0
                ));
            }
            let Some(l2) = entry.offset() else { continue };
            self.refer("L2 table", l2.0, geometry.cluster_size());
            if geometry.in_cluster(l2.0) != 0 {
                self.result.corruption(format!(
                    "ERROR L2 table at {l2} is not cluster aligned; L1 entry {index} corrupted"
                ));
                continue;
            }
            if table == Table::Active {
                self.check_copied("L1 entry", index as u64, l2, entry.is_copied())
                    .await;
            }
            self.walk_l2(table, l2).await;
        }
    }

    async fn walk_l2(&mut self, table: Table, l2: HostOffset) {
        let geometry = self.header.geometry;
        if l2.0 >= self.file_size {
            return;
        }
        let entries = geometry.l2_entries();
        let Some(entries) = self.read_words("L2 table", l2.0, entries).await else {
            return;
        };
        let mut next = None;
        for (index, entry) in entries.into_iter().map(L2Entry).enumerate() {
            if entry.0 == 0 {
                continue;
            }
            self.check_reserved(entry);
            match entry.mapping(&geometry) {
                Mapping::Unallocated | Mapping::Zero => {}
                Mapping::Compressed(extent) => self.count_compressed(extent, entry, table),
                Mapping::Data(host) | Mapping::ZeroAllocated(host) => {
                    if table == Table::Active {
                        self.count_allocated(host, &mut next);
                    }
                    if !self.count_cluster(host) {
                        continue;
                    }
                    if table == Table::Active {
                        self.check_copied("L2 entry", index as u64, host, entry.is_copied())
                            .await;
                    }
                }
            }
        }
    }

    /// The zero flag is a reserved bit before version 3, but every reader heeds it.
    fn check_reserved(&mut self, entry: L2Entry) {
        if matches!(entry.mapping(&self.header.geometry), Mapping::Compressed(_)) {
            return;
        }
        if entry.reserved() != 0 {
            self.result.corruption(format!(
                "ERROR found L2 entry with reserved bits set: {:#x}",
                entry.0
            ));
        }
    }

    fn count_allocated(&mut self, host: HostOffset, next: &mut Option<u64>) {
        self.result.allocated_clusters += 1;
        if next.is_some_and(|next| next != host.0) {
            self.result.fragmented_clusters += 1;
        }
        *next = Some(host.0 + self.header.geometry.cluster_size());
    }

    /// False where the entry is no good.
    fn count_cluster(&mut self, host: HostOffset) -> bool {
        let geometry = self.header.geometry;
        self.refer("cluster", host.0, geometry.cluster_size());
        let aligned = geometry.in_cluster(host.0) == 0;
        if !aligned {
            self.result.corruption(format!(
                "ERROR offset={host}: Cluster is not properly aligned; L2 entry corrupted"
            ));
        }
        aligned
    }

    fn count_compressed(&mut self, extent: CompressedExtent, entry: L2Entry, table: Table) {
        if entry.is_copied() {
            self.result.corruption(format!(
                "ERROR: compressed cluster at {}: copied flag must never be set for compressed \
                 clusters",
                extent.offset
            ));
        }
        if table == Table::Active {
            self.result.compressed_clusters += 1;
            self.result.allocated_clusters += 1;
            self.result.fragmented_clusters += 1;
        }
        let sectors = extent.sectors();
        self.refer("compressed cluster", sectors.start(), sectors.length());
    }

    async fn check_copied(&mut self, what: &str, index: u64, host: HostOffset, copied: bool) {
        let cluster: HostCluster = self.header.geometry.host_cluster(host);
        match self.stored.of(cluster).await {
            Ok(refcount) if copied != (refcount == 1) => {
                let kind = match (copied, refcount) {
                    (false, 1) => FindingKind::NeedlessCopy,
                    _ => FindingKind::Corruption,
                };
                let message = format!(
                    "ERROR OFLAG_COPIED {what} {index}: offset={host} copied={copied} \
                     refcount={refcount}"
                );
                self.result.add(kind, message);
            }
            Ok(_) => {}
            Err(error) => {
                let message = format!("ERROR: no refcount for cluster at {host}: {error}");
                self.result.add(FindingKind::Error, message);
            }
        }
    }

    /// The L1 tables of internal snapshots.
    async fn walk_snapshots(&mut self) {
        let start = self.header.snapshots_offset.0;
        let mut at = start;
        for number in 0..self.header.snapshots {
            let Some((l1, entries, length)) = self.snapshot(at).await else {
                self.result.add(
                    FindingKind::Error,
                    format!("ERROR: snapshot {number} at {at:#x} cannot be read"),
                );
                return;
            };
            at += length;
            let aligned = self.header.geometry.in_cluster(l1.0) == 0;
            if entries * 8 > MAX_L1_BYTES || !aligned {
                self.result.corruption(format!(
                    "ERROR snapshot {number} has an invalid L1 table: offset={l1} entries={entries}"
                ));
                continue;
            }
            self.walk_l1(Table::Snapshot, l1, entries).await;
        }
        self.refer("snapshot table", start, at - start);
    }

    /// The L1 table of the snapshot whose entry is at `at`, and the bytes of the entry.
    async fn snapshot(&self, at: u64) -> Option<(HostOffset, u64, u64)> {
        if at.checked_add(SNAPSHOT_ENTRY)? > self.file_size {
            return None;
        }
        let bytes = self.read(at, SNAPSHOT_ENTRY).await.ok()?;
        let number = |start: usize, length: usize| {
            bytes[start..start + length]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let rest = number(12, 2) + number(14, 2) + number(36, 4);
        if rest > MAX_SNAPSHOT_REST {
            return None;
        }
        let length = align_up(SNAPSHOT_ENTRY + rest, 8)?;
        Some((HostOffset(number(0, 8)), number(8, 4), length))
    }
}

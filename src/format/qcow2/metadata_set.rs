//! Which host clusters hold metadata, so that no data is written over it.

use crate::error::{Error, ErrorKind, Result};

use super::header::Header;
use super::layout::{Geometry, HostCluster, HostOffset, L1Entry, RefcountTableEntry};
use super::slice_cache::NumberSet;
use super::table::Table;

/// Entries of L1 and L2 tables cannot name what lies further on.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Clusters of header, tables and refcount blocks. Kept for images that are written.
#[derive(Default)]
pub(super) struct MetadataSet {
    clusters: NumberSet,
}

impl MetadataSet {
    /// All metadata of an image.
    ///
    /// # Errors
    /// Two structures share a cluster, or one is not aligned.
    pub(super) fn of_image(header: &Header, l1: &Table, refcounts: &Table) -> Result<MetadataSet> {
        let geometry = header.geometry;
        let mut set = MetadataSet::default();
        set.add("header", HostCluster(0), 1)?;
        let l1_clusters = geometry.clusters_for(u64::from(header.l1_entries) * 8).0;
        set.add(
            "active L1 table",
            geometry.host_cluster(header.l1_offset),
            l1_clusters,
        )?;
        let first = geometry.host_cluster(header.refcount_table_offset);
        set.add(
            "refcount table",
            first,
            u64::from(header.refcount_table_clusters),
        )?;
        let aligned = |what: &str, offset: HostOffset, index: usize| {
            if geometry.in_cluster(offset.0) == 0 && offset.0 < MAX_HOST_OFFSET {
                return Ok(geometry.host_cluster(offset));
            }
            let message = format!("{what} offset {offset} invalid (index: {index:#x})");
            Err(Error::new(ErrorKind::Corrupt, message))
        };
        for (index, entry) in l1.entries().iter().enumerate() {
            if let Some(offset) = L1Entry(*entry).offset() {
                set.add("active L2 table", aligned("L2 table", offset, index)?, 1)?;
            }
        }
        for (index, entry) in refcounts.entries().iter().enumerate() {
            if let Some(offset) = RefcountTableEntry(*entry).offset() {
                set.add(
                    "refcount block",
                    aligned("Refcount block", offset, index)?,
                    1,
                )?;
            }
        }
        Ok(set)
    }

    /// Takes in where internal snapshots have their tables: offsets and bytes.
    ///
    /// # Errors
    /// They share a cluster with other metadata, or are not aligned.
    pub(super) fn add_snapshots(
        &mut self,
        geometry: &Geometry,
        places: &[(HostOffset, u64)],
    ) -> Result<()> {
        for (offset, bytes) in places {
            if geometry.in_cluster(offset.0) != 0 {
                let message = format!("snapshot table offset {offset} invalid");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            let count = geometry.clusters_for(*bytes).0;
            self.add("snapshot metadata", geometry.host_cluster(*offset), count)?;
        }
        Ok(())
    }

    /// Takes in what is not there yet.
    ///
    /// # Errors
    /// Some of it is.
    pub(super) fn add(&mut self, what: &str, first: HostCluster, count: u64) -> Result<()> {
        for cluster in first.0..first.0 + count {
            if !self.clusters.insert(cluster) {
                let message =
                    format!("{what} overlaps other metadata at host cluster {cluster:#x}");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
        }
        Ok(())
    }

    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        self.clusters.contains(&cluster.0)
    }

    pub(super) fn insert(&mut self, first: HostCluster, count: u64) {
        self.clusters.extend(first.0..first.0 + count);
    }

    pub(super) fn remove(&mut self, cluster: HostCluster) {
        self.clusters.remove(&cluster.0);
    }
}

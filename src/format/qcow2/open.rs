//! Opening an image.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{Child, DebugEvent, Graph, RangeLock};
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::range::align_up;
use crate::runtime::Handle;

use super::Qcow2;
use super::allocator::Allocator;
use super::bitmaps::{BitmapKeeping, Purpose, StoredBitmaps};
use super::corruption::Health;
use super::epochs::Epochs;
use super::header::{Header, Incompatible, V3_LENGTH, invalid};
use super::layout::{HostOffset, MAX_L1_BYTES};
use super::metadata_set::MetadataSet;
use super::slice_cache::SliceCache;
use super::snapshot_table;
use super::table::Table;
use super::turn::Turn;
use super::write_back::Progress;

/// Bytes of a cached slice, where clusters are not smaller.
const SLICE: u64 = 4096;
/// Default bound of the L2 cache, which is not reached by disks that need less.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
const DEFAULT_REFCOUNT_CACHE: u64 = 1 << 20;
/// Smallest sensible cache: 4 slices.
const MIN_CACHE: u64 = 4 * SLICE;

/// Bounds of the metadata caches in bytes: QEMU's options of these names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheSizes {
    /// Both together.
    pub cache_size: Option<u64>,
    /// L2 tables.
    pub l2_cache_size: Option<u64>,
    /// Refcount blocks.
    pub refcount_cache_size: Option<u64>,
}

impl CacheSizes {
    /// Bytes for L2 tables and for refcount blocks; `l2_needed` is enough for the whole disk.
    fn split(&self, l2_needed: u64) -> Result<(u64, u64)> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::InvalidArgument, message));
        match (
            self.cache_size,
            self.l2_cache_size,
            self.refcount_cache_size,
        ) {
            (Some(_), Some(_), Some(_)) => refuse(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
            (Some(all), Some(l2), _) if l2 > all => {
                refuse("l2-cache-size may not exceed cache-size")
            }
            (Some(all), _, Some(refcount)) if refcount > all => {
                refuse("refcount-cache-size may not exceed cache-size")
            }
            (Some(all), Some(l2), None) => Ok((l2, all - l2)),
            (Some(all), None, Some(refcount)) => Ok((all - refcount, refcount)),
            (Some(all), None, None) => {
                let l2 = l2_needed.min(all.saturating_sub(MIN_CACHE));
                Ok((l2, all - l2))
            }
            (None, l2, refcount) => Ok((
                l2.unwrap_or(l2_needed.min(DEFAULT_L2_CACHE)),
                refcount.unwrap_or(DEFAULT_REFCOUNT_CACHE),
            )),
        }
    }
}

/// How to open an image.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The node-name, for messages and events.
    pub node_name: String,
    /// Where corruption is reported.
    pub graph: Option<Graph>,
    /// Nothing is written.
    pub read_only: bool,
    /// The edge to the backing file; may also come later by `set_backing`.
    pub backing: Option<Rc<Child>>,
    /// Clusters that a discard or a write-zeroes request frees are discarded in the file
    /// (`pass-discard-request`).
    pub pass_discard: bool,
    /// Discards keep clusters allocated (`discard-no-unref`).
    pub discard_no_unref: bool,
    /// Metadata caches.
    pub caches: CacheSizes,
    /// What persistent bitmaps cost while the image is written.
    pub keeping: BitmapKeeping,
    /// Whose threads compress; without them that is done where the request runs.
    pub helpers: Option<Handle>,
}

impl Qcow2 {
    /// Opens the image in `file`. Writes only where `read_only` is not set, and then only what makes a
    /// dirty image clean.
    ///
    /// # Errors
    /// In QEMU's words: not a valid image, a feature that is not supported, or an image that can only
    /// be opened read-only.
    pub async fn open(file: Rc<Child>, options: OpenOptions) -> Result<Qcow2> {
        let header = read_header(&file).await?;
        let (l1, refcount_table) = read_tables(&file, &header).await?;
        let geometry = header.geometry;
        let l2_needed = geometry.clusters_for(header.size).0 * 8;
        let (l2_bytes, refcount_bytes) = options.caches.split(l2_needed.max(MIN_CACHE))?;
        let slice = SLICE.min(geometry.cluster_size()) as usize;
        let image = Qcow2 {
            node_name: options.node_name,
            graph: options.graph,
            file: RefCell::new(file),
            backing: RefCell::new(options.backing),
            pass_discard: Cell::new(options.pass_discard),
            discard_no_unref: options.discard_no_unref,
            version: header.version,
            geometry,
            size: Cell::new(header.size),
            header: RefCell::new(header),
            snapshots: RefCell::default(),
            header_turn: Turn::default(),
            header_unsure: Cell::new(false),
            read_only: Cell::new(true),
            health: RefCell::new(Health::Good),
            writable: Cell::new(false),
            l1: RefCell::new(l1),
            l2: SliceCache::new(slice, l2_bytes),
            tables: Turn::default(),
            refcount_table: RefCell::new(refcount_table),
            refcounts: SliceCache::new(slice, refcount_bytes),
            metadata: RefCell::default(),
            allocator: Allocator::default(),
            epochs: Epochs::default(),
            clusters: RangeLock::new(),
            progress: Progress::default(),
            helpers: options.helpers.clone(),
            decompressed: RefCell::default(),
            bitmaps: StoredBitmaps::new(options.keeping),
        };
        // Apart: chains are opened one future in another, a thousand deep.
        Box::pin(image.load_bitmaps()).await?;
        if !options.read_only {
            image.become_writable().await?;
        } else if let Err(error) = Box::pin(image.load_snapshots()).await {
            // They matter to who writes.
            tracing::warn!(node = image.node_name, %error, "internal snapshots are not shown");
        }
        Ok(image)
    }

    /// Checks that the image may be written, and makes a dirty one clean.
    pub(super) async fn become_writable(&self) -> Result<()> {
        self.check_health()?;
        let header = self.header.borrow().clone();
        let incompatible = header.incompatible;
        if incompatible.contains(Incompatible::CORRUPT) {
            let message = "qcow2: Image is corrupt; cannot be opened read/write";
            return Err(Error::new(ErrorKind::Permission, message));
        }
        Box::pin(self.load_snapshots()).await?;
        self.metadata
            .replace(self.metadata_of(&header, &self.l1.borrow())?);
        let end = align_up(self.file().node().size(), self.geometry.cluster_size());
        let end = HostOffset(end.unwrap_or(u64::MAX));
        self.allocator.touch(self.geometry.host_cluster(end), 0);
        // Slices that were read before were not checked against the metadata.
        self.l2.forget(0..u64::MAX);
        self.refcounts.forget(0..u64::MAX);
        self.read_only.set(false);
        if incompatible.contains(Incompatible::DIRTY) {
            self.rebuild_refcounts().await?;
        }
        self.claim_bitmaps()?;
        Box::pin(self.store_bitmaps(Purpose::Opening)).await
    }

    /// Where metadata lies with this header and L1 table; the snapshots were read.
    ///
    /// # Errors
    /// Two structures share a cluster, or one lies where it cannot.
    pub(super) fn metadata_of(&self, header: &Header, l1: &Table) -> Result<MetadataSet> {
        let size = self.file().node().size();
        let snapshots = snapshot_table::places(&self.snapshots.borrow(), header, size)?;
        let metadata = MetadataSet::of_image(header, l1, &self.refcount_table.borrow());
        let metadata = metadata.and_then(|mut set| {
            set.add_snapshots(&header.geometry, &snapshots)?;
            Ok(set)
        });
        metadata.map_err(|error| {
            let message = format!("qcow2: Image is corrupt: {}", error.message());
            Error::new(ErrorKind::InvalidImage, message)
        })
    }
}

async fn read_header(file: &Rc<Child>) -> Result<Header> {
    let start = read(file, 0, V3_LENGTH as u64, "Could not read qcow2 header").await?;
    let cluster_size = Header::cluster_size(&start)?;
    let length = cluster_size.min(file.node().size());
    let cluster = read(file, 0, length, "Could not read qcow2 header").await?;
    let header = Header::parse(&cluster)?;
    check_inside(file, &header)?;
    Ok(header)
}

/// Tables within the file. A last cluster may be short: nothing was written to its end.
fn check_inside(file: &Rc<Child>, header: &Header) -> Result<()> {
    let geometry = header.geometry;
    let end = align_up(file.node().size(), geometry.cluster_size()).unwrap_or(u64::MAX);
    let check = |what: &str, offset: HostOffset, bytes: u64| match offset.0.checked_add(bytes) {
        Some(last) if last <= end => Ok(()),
        _ => {
            let message = format!(
                "{what} at {offset} of {bytes:#x} bytes ends past the end of the image file ({end:#x})"
            );
            Err(invalid(message))
        }
    };
    let l1_bytes = u64::from(header.l1_entries) * 8;
    debug_assert!(l1_bytes <= MAX_L1_BYTES);
    check("Active L1 table", header.l1_offset, l1_bytes)?;
    let bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    check("Reference count table", header.refcount_table_offset, bytes)
}

async fn read_tables(file: &Rc<Child>, header: &Header) -> Result<(Table, Table)> {
    let l1_bytes = u64::from(header.l1_entries) * 8;
    let l1 = read(
        file,
        header.l1_offset.0,
        l1_bytes,
        "Could not read L1 table",
    )
    .await?;
    let bytes = u64::from(header.refcount_table_clusters) * header.geometry.cluster_size();
    let offset = header.refcount_table_offset.0;
    file.debug_event(DebugEvent::ReftableLoad);
    let refcounts = read(file, offset, bytes, "Could not read reference count table").await?;
    Ok((Table::parse(&l1), Table::parse(&refcounts)))
}

async fn read(file: &Rc<Child>, offset: u64, length: u64, what: &str) -> Result<Vec<u8>> {
    let buffer = MemorySlice::zeroed(length as usize);
    file.read(offset, Payload::from(buffer.clone()))
        .await
        .map_err(|error| error.context(what))?;
    Ok(buffer.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_sizes_follow_qemus_rules() {
        let sizes = |cache_size, l2_cache_size, refcount_cache_size| {
            CacheSizes {
                cache_size,
                l2_cache_size,
                refcount_cache_size,
            }
            .split(1 << 20)
        };
        assert_eq!(
            sizes(None, None, None).ok(),
            Some((1 << 20, DEFAULT_REFCOUNT_CACHE))
        );
        assert_eq!(sizes(Some(100), Some(60), None).ok(), Some((60, 40)));
        assert_eq!(
            sizes(Some(1 << 21), None, None).ok(),
            Some((1 << 20, 1 << 20))
        );
        let error = sizes(Some(1), Some(2), None).expect_err("l2 exceeds all");
        assert_eq!(error.message(), "l2-cache-size may not exceed cache-size");
        assert!(sizes(Some(3), Some(1), Some(1)).is_err());
    }
}

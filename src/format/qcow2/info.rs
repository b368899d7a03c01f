//! What queries show of an image.

use super::header::{BackingReference, CompressionType, Incompatible};
use super::snapshot_table::InternalSnapshot;
use super::{BitmapInfo, Qcow2};

/// `ImageInfoSpecificQCow2` and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: &'static str,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Lazy refcounts are allowed.
    pub lazy_refcounts: bool,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Marked corrupt.
    pub corrupt: bool,
    /// Marked dirty: refcounts may be wrong.
    pub dirty: bool,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Subclusters; never, as such images are refused.
    pub extended_l2: bool,
    /// Internal snapshots.
    pub snapshots: Vec<InternalSnapshot>,
    /// Bitmaps in the image.
    pub bitmaps: Vec<BitmapInfo>,
    /// Backing reference in the header.
    pub backing: Option<BackingReference>,
}

impl Qcow2 {
    /// The image as it is now.
    pub fn info(&self) -> Qcow2Info {
        let header = self.header.borrow();
        Qcow2Info {
            compat: if self.version < 3 { "0.10" } else { "1.1" },
            virtual_size: self.size.get(),
            cluster_size: self.geometry.cluster_size(),
            lazy_refcounts: header.has_lazy_refcounts(),
            refcount_bits: self.geometry.refcount_bits(),
            corrupt: header.incompatible.contains(Incompatible::CORRUPT),
            dirty: header.incompatible.contains(Incompatible::DIRTY),
            compression_type: header.compression,
            extended_l2: false,
            snapshots: self.snapshots(),
            bitmaps: self.bitmap_infos(),
            backing: header.backing.clone(),
        }
    }
}

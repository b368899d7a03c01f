//! Addresses, and the arithmetic between them.
//!
//! Guest and host addresses, offsets and cluster numbers are types of their own, so that mixing them
//! does not compile.

use std::fmt;

pub use super::entry::{
    COMPRESSED_SECTOR, CompressedExtent, L1Entry, L2Entry, Mapping, RefcountTableEntry, refcount,
    set_refcount,
};

/// Smallest cluster: 512 B.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Largest active L1 table in bytes, as in QEMU.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, as in QEMU.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A byte of the virtual disk.
    GuestOffset
}
address! {
    /// A cluster of the virtual disk, by number.
    GuestCluster
}
address! {
    /// A byte of the image file.
    HostOffset
}
address! {
    /// A cluster of the image file, by number.
    HostCluster
}
address! {
    /// A number of clusters.
    ClusterCount
}

impl HostOffset {
    /// `bytes` further on. Entries end below 2^56, so that this does not wrap for any request.
    pub fn plus(self, bytes: u64) -> HostOffset {
        HostOffset(self.0 + bytes)
    }
}

impl HostCluster {
    /// `count` clusters further on.
    pub fn plus(self, count: u64) -> HostCluster {
        HostCluster(self.0 + count)
    }
}

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cluster size is 2 to this power; 9 to 21.
    pub cluster_bits: u32,
    /// A refcount has 2 to this power bits; 0 to 6.
    pub refcount_order: u32,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Log2 of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// L1 entries needed for a disk of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Bits of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Log2 of the refcounts in a refcount block.
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Clusters that hold `bytes` bytes.
    pub fn clusters_for(&self, bytes: u64) -> ClusterCount {
        ClusterCount(bytes.div_ceil(self.cluster_size()))
    }

    /// The offset within its cluster.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The cluster of a guest byte.
    pub fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// The first byte of a guest cluster.
    pub fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The cluster of a host byte.
    pub fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// The first byte of a host cluster.
    pub fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Which L1 entry leads to a guest cluster.
    pub fn l1_index(&self, cluster: GuestCluster) -> usize {
        (cluster.0 >> self.l2_bits()) as usize
    }

    /// Which entry of its L2 table a guest cluster has.
    pub fn l2_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 & (self.l2_entries() - 1)
    }

    /// Which refcount table entry leads to a host cluster's refcount.
    pub fn refcount_table_index(&self, cluster: HostCluster) -> usize {
        (cluster.0 >> self.refcount_block_bits()) as usize
    }

    /// Which refcount of its block a host cluster has.
    pub fn refcount_block_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 & (self.refcount_block_entries() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_common_images() {
        let geometry = Geometry {
            cluster_bits: 16,
            refcount_order: 4,
        };
        assert_eq!(geometry.l2_coverage(), 512 << 20);
        assert_eq!(geometry.l1_entries_for((1 << 30) + 1), 3);
        assert_eq!(geometry.refcount_block_entries(), 32768);
        assert_eq!(geometry.refcount_max(), 0xffff);
    }
}

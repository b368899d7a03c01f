//! New images.
//!
//! Layout: header, refcount table, refcount blocks, L1 table, then with preallocation the L2 tables
//! and the data clusters. The header is written last, so that a crash leaves a whole image or none.

use crate::block::{Child, TruncateOptions, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::extension::known_feature_names;
use super::header::{
    Autoclear, BackingReference, Compatible, CompressionType, Header, Incompatible,
    MAX_BACKING_NAME,
};
use super::layout::{
    Geometry, HostCluster, HostOffset, L1Entry, L2Entry, MAX_CLUSTER_BITS, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, MIN_CLUSTER_BITS, set_refcount,
};

/// The largest file that an image can be, as in QEMU.
const MAX_SIZE: u64 = 9_223_372_035_781_033_984;
/// Bytes that are written at a time.
const PIECE: u64 = 1 << 20;

/// What is allocated in a new image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables and clusters; data clusters are not written.
    Metadata,
}

/// What a new image shall be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of the virtual disk; a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster: a power of two, 512 B to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a refcount: a power of two, 1 to 64.
    pub refcount_bits: u64,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are to be compressed.
    pub compression: CompressionType,
    /// Written to the header as it is; neither opened nor checked.
    pub backing: Option<BackingReference>,
    /// What is allocated.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: CompressionType::Deflate,
            backing: None,
            preallocation: Preallocation::Off,
        }
    }

    /// What can be said without the file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] in QEMU's words.
    pub fn check(&self) -> Result<()> {
        self.geometry()?;
        self.plan().map(|_| ())
    }

    fn geometry(&self) -> Result<Geometry> {
        let clusters = 1 << MIN_CLUSTER_BITS..=1 << MAX_CLUSTER_BITS;
        if !self.size.is_multiple_of(512) {
            return invalid("Image size must be a multiple of 512 bytes");
        }
        if !self.cluster_size.is_power_of_two() || !clusters.contains(&self.cluster_size) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        if self.version < 3 {
            self.check_old_version()?;
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        Ok(Geometry {
            cluster_bits: self.cluster_size.ilog2(),
            refcount_order: self.refcount_bits.ilog2(),
        })
    }

    fn check_old_version(&self) -> Result<()> {
        if self.lazy_refcounts {
            return invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 version=v3 or greater)",
            );
        }
        if self.refcount_bits != 16 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.compression != CompressionType::Deflate {
            return invalid(
                "Non-zlib compression type is only supported with compatibility level 1.1 and \
                 above (use version=v3 or greater)",
            );
        }
        Ok(())
    }

    fn plan(&self) -> Result<Plan> {
        let geometry = self.geometry()?;
        if self.size > MAX_SIZE {
            let message = format!(
                "Could not resize image: offset({}) exceeds maximum({MAX_SIZE})",
                self.size
            );
            return invalid(message);
        }
        let l1_entries = geometry.l1_entries_for(self.size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return invalid("Could not resize image: Failed to grow the L1 table: File too large");
        }
        let plan = Plan::new(geometry, self.size, self.preallocation);
        if plan.refcount_table * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            return invalid("Could not resize image: refcount table would be too large");
        }
        Ok(plan)
    }

    fn header(&self, plan: &Plan) -> Header {
        let mut header = Header {
            version: self.version,
            geometry: plan.geometry,
            size: self.size,
            encryption: 0,
            l1_entries: plan.geometry.l1_entries_for(self.size) as u32,
            l1_offset: HostOffset(0),
            refcount_table_offset: plan.offset(1),
            refcount_table_clusters: plan.refcount_table as u32,
            snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            compression: self.compression,
            backing: self.backing.clone(),
            backing_offset: 0,
            unknown_fields: Vec::new(),
            feature_names: known_feature_names(),
            extensions: Vec::new(),
        };
        if header.l1_entries > 0 {
            header.l1_offset = plan.offset(plan.first_l1());
        }
        let zstd = self.compression == CompressionType::Zstd;
        header.incompatible.set(Incompatible::COMPRESSION, zstd);
        let lazy = self.lazy_refcounts;
        header.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
        header
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

/// Makes `file` an image; what it held is lost. The edge may write and resize. Durable when answered.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] in QEMU's words; what the file says.
pub async fn create(file: &Child, options: &CreateOptions) -> Result<()> {
    let plan = options.plan()?;
    let header = options.header(&plan).serialise();
    let header = header.map_err(|error| match (&options.backing, error.kind()) {
        (Some(backing), ErrorKind::NoSpace | ErrorKind::InvalidArgument) => {
            name_does_not_fit(backing)
        }
        _ => error,
    })?;
    file.truncate(0, TruncateOptions::default()).await?;
    let whole = ByteRange::between(0, plan.metadata_end());
    file.write_zeroes(whole, ZeroFlags::empty()).await?;
    plan.write_refcounts(file).await?;
    if plan.data > 0 {
        plan.write_mapping(file).await?;
        let end = plan.total() << plan.geometry.cluster_bits;
        file.truncate(end, TruncateOptions::default()).await?;
    }
    file.flush().await?;
    write(file, 0, &header.to_bytes()).await?;
    file.flush().await
}

fn name_does_not_fit(backing: &BackingReference) -> Error {
    let reason = match backing.file.len() > MAX_BACKING_NAME {
        true => (ErrorKind::InvalidArgument, "Invalid argument"),
        false => (ErrorKind::NoSpace, "No space left on device"),
    };
    let format = backing.format.as_deref().unwrap_or("(null)");
    let message = format!(
        "Could not assign backing file '{}' with format '{format}': {}",
        backing.file, reason.1
    );
    Error::new(reason.0, message)
}

async fn write(file: &Child, offset: u64, bytes: &[u8]) -> Result<()> {
    let payload = MemorySlice::from_bytes(bytes).into();
    file.write(offset, payload, WriteFlags::empty()).await
}

/// How many clusters of which kind, in the order in which they lie in the file after the header.
struct Plan {
    geometry: Geometry,
    refcount_table: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Plan {
    fn new(geometry: Geometry, size: u64, preallocation: Preallocation) -> Plan {
        let l1_entries = geometry.l1_entries_for(size);
        let (l2, data) = match preallocation {
            Preallocation::Off => (0, 0),
            Preallocation::Metadata => (l1_entries, geometry.clusters_for(size).0),
        };
        let mut plan = Plan {
            geometry,
            refcount_table: 1,
            refcount_blocks: 1,
            l1_entries,
            l1: geometry.clusters_for(l1_entries * 8).0,
            l2,
            data,
        };
        plan.fit_refcounts();
        plan
    }

    /// Refcounts count their own clusters too: grows both structures until all have one.
    fn fit_refcounts(&mut self) {
        loop {
            let blocks = self
                .total()
                .div_ceil(self.geometry.refcount_block_entries());
            let table = self.geometry.clusters_for(blocks * 8).0;
            if blocks <= self.refcount_blocks && table <= self.refcount_table {
                return;
            }
            self.refcount_blocks = self.refcount_blocks.max(blocks);
            self.refcount_table = self.refcount_table.max(table);
        }
    }

    fn first_l1(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1
    }

    /// Clusters that are not data.
    fn metadata(&self) -> u64 {
        self.first_l2() + self.l2
    }

    /// Bytes up to the end of the metadata. As in QEMU's images an L1 table at the end of the file
    /// takes up whole sectors, not whole clusters.
    fn metadata_end(&self) -> u64 {
        if self.l2 > 0 || self.l1 == 0 {
            return self.metadata() << self.geometry.cluster_bits;
        }
        self.offset(self.first_l1()).0 + (self.l1_entries * 8).next_multiple_of(512)
    }

    fn total(&self) -> u64 {
        self.metadata() + self.data
    }

    fn offset(&self, cluster: u64) -> HostOffset {
        self.geometry.host_offset(HostCluster(cluster))
    }

    /// Every cluster has refcount 1.
    async fn write_refcounts(&self, file: &Child) -> Result<()> {
        let first = 1 + self.refcount_table;
        let blocks = first..first + self.refcount_blocks;
        let entries = blocks.clone().map(|cluster| self.offset(cluster).0);
        write_words(file, self.offset(1), entries).await?;
        let entries = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order;
        let mut left = self.total();
        for block in blocks {
            let mut bytes = vec![0; self.geometry.cluster_size() as usize];
            for index in 0..left.min(entries) {
                set_refcount(&mut bytes, index as usize, order, 1);
            }
            left = left.saturating_sub(entries);
            write(file, self.offset(block).0, &bytes).await?;
        }
        Ok(())
    }

    /// Every guest cluster has a data cluster.
    async fn write_mapping(&self, file: &Child) -> Result<()> {
        let tables = self.first_l2()..self.first_l2() + self.l2;
        let clusters = self.metadata()..self.total();
        let tables = tables.map(|cluster| L1Entry::table(self.offset(cluster)).0);
        write_words(file, self.offset(self.first_l1()), tables).await?;
        let clusters = clusters.map(|cluster| L2Entry::data(self.offset(cluster)).0);
        write_words(file, self.offset(self.first_l2()), clusters).await
    }
}

/// Writes big-endian words one after the other.
async fn write_words(
    file: &Child,
    offset: HostOffset,
    mut words: impl Iterator<Item = u64>,
) -> Result<()> {
    let mut offset = offset.0;
    loop {
        let piece = words.by_ref().take((PIECE / 8) as usize);
        let bytes: Vec<u8> = piece.flat_map(u64::to_be_bytes).collect();
        if bytes.is_empty() {
            return Ok(());
        }
        write(file, offset, &bytes).await?;
        offset += bytes.len() as u64;
    }
}

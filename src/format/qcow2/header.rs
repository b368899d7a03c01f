//! The header: parsed into types, with every field within its bounds (`header_check`).
//! Writing: `header_write`.

use bitflags::bitflags;

use crate::error::{Error, ErrorKind, Result};

use super::extension::{self, Extension, FeatureName};
use super::layout::{Geometry, HostOffset, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};

/// Bytes of a version 2 header.
pub const V2_LENGTH: usize = 72;
/// Bytes of a version 3 header that every version 3 image has.
pub const V3_MIN_LENGTH: usize = 104;
/// Bytes of a version 3 header with all fields known here.
pub const V3_LENGTH: usize = 112;
/// Longest backing file name in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// Longest backing format name in bytes.
pub const MAX_BACKING_FORMAT: usize = 15;
const MAGIC: u32 = 0x5146_49fb;

bitflags! {
    /// Features that one must know to open the image at all.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1;
        /// Metadata is wrong: not to be written.
        const CORRUPT = 1 << 1;
        /// Guest data lies in another file.
        const DATA_FILE = 1 << 2;
        /// The header's compression type is not deflate.
        const COMPRESSION = 1 << 3;
        /// L2 entries of 128 bits with subclusters.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }

    /// Features that one may ignore.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late, under the dirty mark.
        const LAZY_REFCOUNTS = 1;
        const _ = !0;
    }

    /// Features whose bit a writer that does not know them must clear.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1;
        /// The external data file is raw.
        const DATA_FILE_RAW = 1 << 1;
        /// Ours: bitmaps that are marked in use have all that has changed, and perhaps more.
        const BITMAPS_KEPT = 1 << 63;
        const _ = !0;
    }
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate (RFC 1951).
    #[default]
    Deflate,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// As `qemu-img info` calls it.
    pub fn name(self) -> &'static str {
        match self {
            CompressionType::Deflate => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// The backing reference: data, until `blockdev` acts on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// As the header has it: a file name, `json:…`, a URL.
    pub file: String,
    /// The format, where the header names one.
    pub format: Option<String>,
}

/// The parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster and refcount sizes.
    pub geometry: Geometry,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// 0: none.
    pub encryption: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// The active L1 table.
    pub l1_offset: HostOffset,
    /// The refcount table.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The snapshot table.
    pub snapshots_offset: HostOffset,
    /// Incompatible features.
    pub incompatible: Incompatible,
    /// Compatible features.
    pub compatible: Compatible,
    /// Autoclear features.
    pub autoclear: Autoclear,
    /// Compression type.
    pub compression: CompressionType,
    /// Backing file name and format.
    pub backing: Option<BackingReference>,
    /// Where the backing file name lies in the file; 0: anywhere.
    pub backing_offset: u64,
    /// Header fields after [`V3_LENGTH`], which nobody here knows.
    pub unknown_fields: Vec<u8>,
    /// Names of features.
    pub feature_names: Vec<FeatureName>,
    /// Other extensions, in order.
    pub extensions: Vec<Extension>,
}

/// Big-endian fields of a header, by offset.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, offset: usize) -> u32 {
        self.0[offset..offset + 4]
            .iter()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from(self.u32(offset)) << 32 | u64::from(self.u32(offset + 4))
    }
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

impl Header {
    /// The cluster size in bytes, from the first [`V2_LENGTH`] bytes of the file at least: how much
    /// [`Header::parse`] wants to see.
    ///
    /// # Errors
    /// Not a qcow2 image, a version or a cluster size out of bounds.
    pub fn cluster_size(start: &[u8]) -> Result<u64> {
        check_start(start).map(|cluster_bits| 1 << cluster_bits)
    }

    /// Parses the first cluster of an image (shorter where the file ends).
    ///
    /// # Errors
    /// In QEMU's words: a field out of its bounds, a feature that is not supported.
    pub fn parse(cluster: &[u8]) -> Result<Header> {
        let cluster_bits = check_start(cluster)?;
        let fields = Fields(cluster);
        let version = fields.u32(4);
        let header_length = header_length(&fields, version, cluster_bits)?;
        let mut header = fixed_fields(&fields, version, cluster_bits, header_length)?;
        let end = extensions_end(&fields, cluster_bits)?;
        header.unknown_fields = cluster
            .get(V3_LENGTH..header_length)
            .unwrap_or_default()
            .to_vec();
        let extensions = extension::parse(cluster, header_length, end)?;
        header.feature_names = extensions.feature_names;
        header.extensions = extensions.others;
        header.check_features()?;
        let has_type = header_length > V3_MIN_LENGTH;
        header.check_compression(if has_type { cluster[V3_MIN_LENGTH] } else { 0 })?;
        header.check_tables()?;
        header.backing =
            backing_name(cluster, &fields, cluster_bits)?.map(|file| BackingReference {
                file,
                format: extensions.backing_format,
            });
        header.backing_offset = fields.u64(8);
        Ok(header)
    }

    /// Lazy refcounts are allowed.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible.contains(Compatible::LAZY_REFCOUNTS)
    }
}

/// Magic, version and cluster size.
fn check_start(start: &[u8]) -> Result<u32> {
    let fields = Fields(start);
    if start.len() < V2_LENGTH || fields.u32(0) != MAGIC {
        return Err(invalid("Image is not in qcow2 format"));
    }
    let version = fields.u32(4);
    if !(2..=3).contains(&version) {
        return Err(unsupported(format!("Unsupported qcow2 version {version}")));
    }
    let cluster_bits = fields.u32(20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(invalid(format!(
            "Unsupported cluster size: 2^{cluster_bits}"
        )));
    }
    Ok(cluster_bits)
}

fn header_length(fields: &Fields, version: u32, cluster_bits: u32) -> Result<usize> {
    if version == 2 {
        return Ok(V2_LENGTH);
    }
    if fields.0.len() < V3_MIN_LENGTH || (fields.u32(100) as usize) < V3_MIN_LENGTH {
        return Err(invalid("qcow2 header too short"));
    }
    let length = fields.u32(100) as usize;
    if length > 1 << cluster_bits {
        return Err(invalid("qcow2 header exceeds cluster size"));
    }
    if length > fields.0.len() {
        return Err(invalid("Could not read unknown qcow2 header fields"));
    }
    Ok(length)
}

fn fixed_fields(
    fields: &Fields,
    version: u32,
    cluster_bits: u32,
    header_length: usize,
) -> Result<Header> {
    let v3 = version >= 3;
    let feature = |offset| if v3 { fields.u64(offset) } else { 0 };
    assert!(!v3 || header_length >= V3_MIN_LENGTH, "checked before");
    Ok(Header {
        version,
        geometry: Geometry {
            cluster_bits,
            refcount_order: if v3 { fields.u32(96) } else { 4 },
        },
        size: fields.u64(24),
        encryption: fields.u32(32),
        l1_entries: fields.u32(36),
        l1_offset: HostOffset(fields.u64(40)),
        refcount_table_offset: HostOffset(fields.u64(48)),
        refcount_table_clusters: fields.u32(56),
        snapshots: fields.u32(60),
        snapshots_offset: HostOffset(fields.u64(64)),
        incompatible: Incompatible::from_bits_retain(feature(72)),
        compatible: Compatible::from_bits_retain(feature(80)),
        autoclear: Autoclear::from_bits_retain(feature(88)),
        compression: CompressionType::Deflate,
        backing: None,
        backing_offset: 0,
        unknown_fields: Vec::new(),
        feature_names: Vec::new(),
        extensions: Vec::new(),
    })
}

/// Extensions end where the backing file name begins, or with the first cluster.
fn extensions_end(fields: &Fields, cluster_bits: u32) -> Result<usize> {
    let cluster_size = 1u64 << cluster_bits;
    match fields.u64(8) {
        0 => Ok(cluster_size as usize),
        offset if offset > cluster_size => Err(invalid("Invalid backing file offset")),
        offset => Ok(offset as usize),
    }
}

fn backing_name(cluster: &[u8], fields: &Fields, cluster_bits: u32) -> Result<Option<String>> {
    let (offset, length) = (fields.u64(8) as usize, fields.u32(16) as usize);
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_BACKING_NAME.min((1 << cluster_bits) - offset) {
        return Err(invalid("Backing file name too long"));
    }
    let Some(name) = cluster.get(offset..offset + length) else {
        return Err(invalid("Could not read backing file name"));
    };
    if name.contains(&0) {
        return Err(invalid("Backing file name contains a NUL character"));
    }
    match std::str::from_utf8(name) {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(invalid("Backing file name is not valid UTF-8")),
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;

//! Writing the header.
//!
//! Everything but the backing file name lies in the first 512 bytes, which a disk writes whole or not
//! at all (the table of feature names gives way if need be); the name goes to a place where the name
//! of the header on disk is not. So a header can be replaced without a moment in which it is neither
//! the old one nor the new one.

use crate::error::{Error, ErrorKind, Result};

use super::extension::{self, FEATURE_ENTRY, FeatureName};
use super::header::{
    BackingReference, CompressionType, Header, MAX_BACKING_FORMAT, MAX_BACKING_NAME, V2_LENGTH,
    V3_LENGTH,
};

/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// The two places of a backing file name in clusters that have room for both.
const NAME_PLACES: [usize; 2] = [SECTOR, 2048];

/// A header as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderImage {
    /// From the start of the file: header and extensions; padded to whole sectors.
    pub head: Vec<u8>,
    /// The backing file name and its place where it is not in `head`. To be durable before `head` is
    /// written.
    pub name: Option<(u64, Vec<u8>)>,
}

impl HeaderImage {
    fn without_name(mut head: Vec<u8>) -> HeaderImage {
        head.resize(head.len().next_multiple_of(SECTOR), 0);
        HeaderImage { head, name: None }
    }

    /// The bytes from the start of the file up to the end of header, extensions and name.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.head.clone();
        if let Some((offset, name)) = &self.name {
            bytes.resize(bytes.len().max(*offset as usize + name.len()), 0);
            bytes[*offset as usize..][..name.len()].copy_from_slice(name);
        }
        bytes
    }
}

impl Header {
    /// The header as bytes. Where [`Header::backing_offset`] tells where the name is on disk now, the
    /// name goes elsewhere, if the cluster has room.
    ///
    /// # Errors
    /// No space in the first cluster; a backing reference that is too long or contains NUL.
    pub fn serialise(&self) -> Result<HeaderImage> {
        let cluster_size = self.geometry.cluster_size() as usize;
        let name = match &self.backing {
            Some(backing) => checked_name(backing)?,
            None => &[],
        };
        let mut head = self.fixed_part();
        self.put_extensions(&mut head, cluster_size, name.len())?;
        if name.is_empty() {
            return Ok(HeaderImage::without_name(head));
        }
        let place = self.name_place(head.len(), name.len());
        if place + name.len() > cluster_size {
            return Err(no_space());
        }
        head[8..16].copy_from_slice(&(place as u64).to_be_bytes());
        head[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        if place == head.len() {
            head.extend_from_slice(name);
            return Ok(HeaderImage::without_name(head));
        }
        let name = Some((place as u64, name.to_vec()));
        Ok(HeaderImage {
            name,
            ..HeaderImage::without_name(head)
        })
    }

    fn fixed_part(&self) -> Vec<u8> {
        let mut head = vec![
            0;
            if self.version >= 3 {
                V3_LENGTH
            } else {
                V2_LENGTH
            }
        ];
        let mut put = |offset: usize, bytes: &[u8]| {
            head[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.geometry.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(32, &self.encryption.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.0.to_be_bytes());
        put(48, &self.refcount_table_offset.0.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.0.to_be_bytes());
        if self.version >= 3 {
            let length = V3_LENGTH + self.unknown_fields.len();
            put(72, &self.incompatible.bits().to_be_bytes());
            put(80, &self.compatible.bits().to_be_bytes());
            put(88, &self.autoclear.bits().to_be_bytes());
            put(96, &self.geometry.refcount_order.to_be_bytes());
            put(100, &(length as u32).to_be_bytes());
            put(104, &[u8::from(self.compression == CompressionType::Zstd)]);
            head.extend_from_slice(&self.unknown_fields);
        }
        head
    }

    fn put_extensions(
        &self,
        head: &mut Vec<u8>,
        cluster_size: usize,
        name_length: usize,
    ) -> Result<()> {
        if let Some(format) = self
            .backing
            .as_ref()
            .and_then(|backing| backing.format.as_ref())
        {
            put_extension(head, extension::BACKING_FORMAT, format.as_bytes());
        }
        for extension in &self.extensions {
            put_extension(head, extension.magic, &extension.data);
        }
        let mut room = SECTOR.saturating_sub(head.len() + 16);
        if cluster_size < NAME_PLACES[1] * 2 {
            room = room.min((cluster_size).saturating_sub(head.len() + 16 + name_length));
        }
        let fits = (room / FEATURE_ENTRY).min(self.feature_names.len());
        if fits > 0 && self.version >= 3 {
            let table = feature_table(&self.feature_names[..fits]);
            put_extension(head, extension::FEATURE_NAMES, &table);
        }
        if head.len() + 8 > cluster_size {
            return Err(no_space());
        }
        put_extension(head, 0, &[]);
        Ok(())
    }

    fn name_place(&self, head: usize, length: usize) -> usize {
        let cluster_size = self.geometry.cluster_size() as usize;
        if head > SECTOR || cluster_size < NAME_PLACES[1] * 2 {
            return head;
        }
        let [first, second] = NAME_PLACES;
        let now = self.backing_offset as usize;
        let overlaps = now != 0 && now < first + length && first < now + MAX_BACKING_NAME;
        if overlaps { second } else { first }
    }
}

fn checked_name(backing: &BackingReference) -> Result<&[u8]> {
    let name = backing.file.as_bytes();
    let format = backing.format.as_deref().unwrap_or("");
    let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidArgument, message));
    if name.len() > MAX_BACKING_NAME {
        return invalid("Backing file name too long");
    }
    if format.len() > MAX_BACKING_FORMAT {
        return invalid("Backing format name too long");
    }
    if name.contains(&0) || format.contains('\0') {
        return invalid("Backing file name contains a NUL character");
    }
    Ok(name)
}

fn put_extension(head: &mut Vec<u8>, magic: u32, data: &[u8]) {
    head.extend_from_slice(&magic.to_be_bytes());
    head.extend_from_slice(&(data.len() as u32).to_be_bytes());
    head.extend_from_slice(data);
    head.resize(head.len().next_multiple_of(8), 0);
}

fn feature_table(names: &[FeatureName]) -> Vec<u8> {
    let mut table = vec![0; names.len() * FEATURE_ENTRY];
    for (entry, feature) in table.chunks_exact_mut(FEATURE_ENTRY).zip(names) {
        let name = feature.name.as_bytes();
        let length = name.len().min(FEATURE_ENTRY - 2);
        entry[0] = feature.kind.number();
        entry[1] = feature.bit;
        entry[2..2 + length].copy_from_slice(&name[..length]);
    }
    table
}

fn no_space() -> Error {
    Error::new(ErrorKind::NoSpace, "No space left in the header cluster")
}

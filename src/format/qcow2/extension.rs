//! Header extensions: what follows the fixed header in the first cluster.

use crate::error::Result;

use super::header::{MAX_BACKING_FORMAT, invalid};

const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// The bitmaps extension: kept as it is as long as its autoclear bit is set.
pub const BITMAPS: u32 = 0x2385_2875;
pub(super) const FEATURE_ENTRY: usize = 48;
const NAME_LENGTH: usize = 46;

/// An extension that is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// The three sets of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Features {
    /// Must be known.
    Incompatible,
    /// May be ignored.
    Compatible,
    /// Cleared by writers that do not know them.
    Autoclear,
    /// A set that the specification does not have.
    Other(u8),
}

impl Features {
    pub(super) fn number(self) -> u8 {
        match self {
            Features::Incompatible => 0,
            Features::Compatible => 1,
            Features::Autoclear => 2,
            Features::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Features {
        match number {
            0 => Features::Incompatible,
            1 => Features::Compatible,
            2 => Features::Autoclear,
            other => Features::Other(other),
        }
    }
}

/// The name that the image has for a feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// In which set.
    pub kind: Features,
    /// Which bit of the set.
    pub bit: u8,
    /// The name; at most 46 bytes.
    pub name: String,
}

/// The names that new images get.
pub fn known_feature_names() -> Vec<FeatureName> {
    let names = [
        (Features::Incompatible, 0, "dirty bit"),
        (Features::Incompatible, 1, "corrupt bit"),
        (Features::Incompatible, 2, "external data file"),
        (Features::Incompatible, 3, "compression type"),
        (Features::Incompatible, 4, "extended L2 entries"),
        (Features::Compatible, 0, "lazy refcounts"),
        (Features::Autoclear, 0, "bitmaps"),
        (Features::Autoclear, 1, "raw external data"),
    ];
    names
        .into_iter()
        .map(|(kind, bit, name)| FeatureName {
            kind,
            bit,
            name: name.to_owned(),
        })
        .collect()
}

/// The extensions of a header, sorted.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) backing_format: Option<String>,
    pub(super) feature_names: Vec<FeatureName>,
    pub(super) others: Vec<Extension>,
}

/// Parses the extensions from `start` to `end` of the first cluster; a file that ends before counts
/// as zeroes there, and a zero ends the list.
pub(super) fn parse(cluster: &[u8], start: usize, end: usize) -> Result<Extensions> {
    let mut found = Extensions::default();
    let mut offset = start;
    while end.saturating_sub(offset) >= 8 {
        let magic = word(cluster, offset);
        let length = word(cluster, offset + 4) as usize;
        offset += 8;
        if magic == END {
            break;
        }
        if length > end - offset {
            return Err(invalid("Header extension too large"));
        }
        let Some(data) = cluster.get(offset..offset + length) else {
            return Err(invalid(
                "Header extension lies past the end of the image file",
            ));
        };
        found.add(magic, data)?;
        offset += length.next_multiple_of(8);
    }
    Ok(found)
}

impl Extensions {
    fn add(&mut self, magic: u32, data: &[u8]) -> Result<()> {
        match magic {
            BACKING_FORMAT => self.backing_format = Some(backing_format(data)?),
            FEATURE_NAMES => self.feature_names = feature_names(data),
            _ => self.others.push(Extension {
                magic,
                data: data.to_vec(),
            }),
        }
        Ok(())
    }
}

fn backing_format(data: &[u8]) -> Result<String> {
    if data.len() > MAX_BACKING_FORMAT {
        let length = data.len();
        let message = format!("ERROR: ext_backing_format: len={length} too large (>=16)");
        return Err(invalid(message));
    }
    Ok(text(data))
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let entries = data.chunks_exact(FEATURE_ENTRY);
    entries
        .map(|entry| FeatureName {
            kind: Features::from_number(entry[0]),
            bit: entry[1],
            name: text(&entry[2..2 + NAME_LENGTH]),
        })
        .filter(|feature| !feature.name.is_empty())
        .collect()
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A big-endian word; zero past the end.
fn word(bytes: &[u8], offset: usize) -> u32 {
    (offset..offset + 4).fold(0, |value, at| {
        value << 8 | u32::from(bytes.get(at).copied().unwrap_or(0))
    })
}

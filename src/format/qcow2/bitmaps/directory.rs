//! The bitmaps extension, its directory and the entries of bitmap tables as bytes.

use bitflags::bitflags;

use crate::error::Result;

use super::super::extension::{BITMAPS, Extension};
use super::super::header::{Header, invalid};
use super::super::layout::HostOffset;

/// Bytes of the fixed part of a directory entry.
const FIXED: usize = 24;
/// Most bytes of a directory, as in QEMU.
const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bitmaps of an image, as in QEMU.
pub(super) const MAX_BITMAPS: usize = 65535;
/// A bitmap that tracks what is dirty; there is no other kind yet.
const TRACKING: u8 = 1;
/// Log2 of the granularities that QEMU stores.
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest name in bytes.
pub(super) const MAX_NAME: usize = 1023;
/// Bits 9 to 55 of a table entry: a cluster.
const CLUSTER_MASK: u64 = 0x00ff_ffff_ffff_fe00;

bitflags! {
    /// Flags of a directory entry.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct EntryFlags: u32 {
        /// Perhaps not saved correctly.
        const IN_USE = 1;
        /// Records writes from the opening on.
        const AUTO = 2;
        /// May be used although extra data is not understood.
        const EXTRA_COMPATIBLE = 4;
        const _ = !0;
    }
}

/// Where the header says that the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: HostOffset,
    pub(super) bytes: u64,
}

/// A bitmap as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) table: HostOffset,
    /// Entries of the table.
    pub(super) length: u32,
    pub(super) flags: EntryFlags,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) extra: Vec<u8>,
    pub(super) name: Vec<u8>,
}

impl Entry {
    /// One that tracks what is dirty, without a table yet.
    pub(super) fn new(name: &str, granularity: u64) -> Entry {
        Entry {
            table: HostOffset(0),
            length: 0,
            flags: EntryFlags::empty(),
            kind: TRACKING,
            granularity_bits: granularity.trailing_zeros() as u8,
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
        }
    }

    /// The name of one that may be used here; any other is left as it is.
    pub(super) fn usable_name(&self) -> Option<&str> {
        let known = EntryFlags::IN_USE | EntryFlags::AUTO | EntryFlags::EXTRA_COMPATIBLE;
        let understood = self.extra.is_empty() || self.flags.contains(EntryFlags::EXTRA_COMPATIBLE);
        let usable = self.kind == TRACKING
            && understood
            && (self.flags - known).is_empty()
            && GRANULARITY_BITS.contains(&self.granularity_bits)
            && (1..=MAX_NAME).contains(&self.name.len());
        std::str::from_utf8(&self.name).ok().filter(|_| usable)
    }

    fn serialise(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.table.0.to_be_bytes());
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes.extend_from_slice(&self.flags.bits().to_be_bytes());
        bytes.extend_from_slice(&[self.kind, self.granularity_bits]);
        bytes.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.extra);
        bytes.extend_from_slice(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// The directory's place and how many entries it has, where the header has bitmaps.
pub(super) fn place(header: &Header) -> Result<Option<(Place, usize)>> {
    let mut extensions = header.extensions.iter();
    let Some(extension) = extensions.find(|other| other.magic == BITMAPS) else {
        return Ok(None);
    };
    let Ok(data): std::result::Result<[u8; 24], _> = extension.data.as_slice().try_into() else {
        return Err(invalid("bitmaps_ext: Invalid extension length"));
    };
    let number = |range: std::ops::Range<usize>| {
        let bytes = data[range].iter();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let (count, reserved) = (number(0..4), number(4..8));
    let (bytes, offset) = (number(8..16), number(16..24));
    let refuse = |what: &str| Err(invalid(format!("bitmaps_ext: {what}")));
    if reserved != 0 {
        return refuse("Reserved field is not zero");
    }
    if count > MAX_BITMAPS as u64 {
        return refuse("image has more bitmaps than QEMU stores (65535)");
    }
    if count == 0 {
        return refuse("found bitmaps extension with zero bitmaps");
    }
    if offset & (header.geometry.cluster_size() - 1) != 0 || offset == 0 || offset >= 1 << 56 {
        return refuse("invalid bitmap directory offset");
    }
    if bytes > MAX_DIRECTORY {
        return refuse("bitmap directory size exceeds the maximum supported size (67108864)");
    }
    let place = Place {
        offset: HostOffset(offset),
        bytes,
    };
    Ok(Some((place, count as usize)))
}

/// Puts the place into a header, or takes it away.
pub(super) fn set_place(header: &mut Header, place: Option<(Place, usize)>) {
    let mut extensions = std::mem::take(&mut header.extensions);
    extensions.retain(|other| other.magic != BITMAPS);
    if let Some((place, count)) = place {
        let mut data = (count as u32).to_be_bytes().to_vec();
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&place.bytes.to_be_bytes());
        data.extend_from_slice(&place.offset.0.to_be_bytes());
        extensions.push(Extension {
            magic: BITMAPS,
            data,
        });
    }
    header.extensions = extensions;
}

/// The entries of a directory.
pub(super) fn parse(mut bytes: &[u8], count: usize) -> Result<Vec<Entry>> {
    let broken = || invalid("Bitmap directory is broken");
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let fixed = bytes.get(..FIXED).ok_or_else(broken)?;
        let number = |range: std::ops::Range<usize>| {
            let bytes = fixed[range].iter();
            bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let (name, extra) = (number(18..20) as usize, number(20..24) as usize);
        let length = (FIXED + extra + name).next_multiple_of(8);
        let rest = bytes.get(FIXED..length).ok_or_else(broken)?;
        entries.push(Entry {
            table: HostOffset(number(0..8)),
            length: number(8..12) as u32,
            flags: EntryFlags::from_bits_retain(number(12..16) as u32),
            kind: fixed[16],
            granularity_bits: fixed[17],
            extra: rest[..extra].to_vec(),
            name: rest[extra..extra + name].to_vec(),
        });
        bytes = &bytes[length..];
        if entries.len() > count {
            return Err(broken());
        }
    }
    match entries.len() == count {
        true => Ok(entries),
        false => Err(broken()),
    }
}

/// A directory of these entries.
pub(super) fn serialise<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.for_each(|entry| entry.serialise(&mut bytes));
    bytes
}

/// Whether a directory of so many bytes is too long.
pub(super) fn is_too_long(bytes: usize) -> bool {
    bytes as u64 > MAX_DIRECTORY
}

/// What an entry of a bitmap table says of its part of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Clean,
    Dirty,
    Stored(HostOffset),
}

impl Part {
    pub(super) fn parse(entry: u64, cluster_size: u64) -> Result<Part> {
        let offset = entry & CLUSTER_MASK;
        match (offset, entry & !CLUSTER_MASK) {
            (0, 0) => Ok(Part::Clean),
            (0, 1) => Ok(Part::Dirty),
            (_, 0) if offset & (cluster_size - 1) == 0 => Ok(Part::Stored(HostOffset(offset))),
            _ => Err(invalid(format!("Bitmap table entry {entry:#x} is invalid"))),
        }
    }

    pub(super) fn entry(self) -> u64 {
        match self {
            Part::Clean => 0,
            Part::Dirty => 1,
            Part::Stored(offset) => offset.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let mut foreign = Entry::new("other", 512);
        foreign.kind = 7;
        foreign.extra = vec![1, 2, 3];
        foreign.flags = EntryFlags::from_bits_retain(0x80);
        let mut own = Entry::new("own", 65536);
        own.table = HostOffset(0x50000);
        own.length = 3;
        own.flags = EntryFlags::AUTO;
        vec![own, foreign]
    }

    #[test]
    fn a_directory_goes_out_and_comes_back() {
        let entries = entries();
        let bytes = serialise(entries.iter());
        assert_eq!(parse(&bytes, 2).expect("well-formed"), entries);
        assert_eq!(entries[0].usable_name(), Some("own"));
        assert_eq!(entries[1].usable_name(), None);
    }

    #[test]
    fn a_broken_directory_is_refused_wherever_it_ends() {
        let bytes = serialise(entries().iter());
        for end in 0..bytes.len() {
            assert!(parse(&bytes[..end], 2).is_err(), "cut at {end}");
        }
        assert!(parse(&bytes, 1).is_err() && parse(&bytes, 3).is_err());
    }

    #[test]
    fn table_entries_say_clean_dirty_or_where() {
        for entry in [0, 1, 0x10000, 0x00ff_ffff_ffff_0000] {
            let part = Part::parse(entry, 65536).expect("valid");
            assert_eq!(part.entry(), entry);
        }
        for entry in [2, 0x10001, 0x8000, 1 << 56, u64::MAX] {
            assert!(Part::parse(entry, 65536).is_err(), "{entry:#x}");
        }
    }
}

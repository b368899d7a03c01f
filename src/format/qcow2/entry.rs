//! Entries of L1, L2 and refcount tables, and refcounts.

use crate::range::ByteRange;

use super::layout::{Geometry, HostOffset};

/// Bits 9 to 55 of an entry: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what is named here is exactly 1.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry since version 3: reads as zeroes.
const ZERO: u64 = 1;
/// Compressed data is counted in sectors of this many bytes.
pub const COMPRESSED_SECTOR: u64 = 512;

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// To an L2 table whose refcount is 1.
    pub fn table(offset: HostOffset) -> L1Entry {
        L1Entry(offset.0 | COPIED)
    }

    /// The L2 table; `None` where all of its clusters are unallocated.
    pub fn offset(self) -> Option<HostOffset> {
        let offset = self.0 & OFFSET_MASK;
        (offset != 0).then_some(HostOffset(offset))
    }

    /// The L2 table may be changed in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same table, which may be changed in place or not.
    pub fn with_copied(self, copied: bool) -> L1Entry {
        L1Entry(with_copied(self.0, copied))
    }

    /// Bits that the specification wants to be 0.
    pub fn reserved(self) -> u64 {
        self.0 & !(COPIED | OFFSET_MASK)
    }
}

fn with_copied(entry: u64, copied: bool) -> u64 {
    match copied {
        true => entry | COPIED,
        false => entry & !COPIED,
    }
}

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// The refcount block; `None` where all its refcounts are 0.
    pub fn offset(self) -> Option<HostOffset> {
        let offset = self.0 & !0x1ff;
        (offset != 0).then_some(HostOffset(offset))
    }

    /// Bits that the specification wants to be 0.
    pub fn reserved(self) -> u64 {
        self.0 & 0x1ff
    }
}

/// Where a compressed cluster lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// First byte; any alignment.
    pub offset: HostOffset,
    /// Bytes up to the end of its last sector; the compressed data may end before.
    pub length: u64,
}

impl CompressedExtent {
    /// The sectors that it touches, whole.
    pub fn sectors(&self) -> ByteRange {
        ByteRange::between(self.offset.0, self.offset.0 + self.length)
            .align_outward(COMPRESSED_SECTOR)
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The backing file decides.
    Unallocated,
    /// Zeroes, no space.
    Zero,
    /// Zeroes, with a host cluster kept.
    ZeroAllocated(HostOffset),
    /// Data as it is.
    Data(HostOffset),
    /// Compressed data.
    Compressed(CompressedExtent),
}

impl Mapping {
    /// The host cluster that the entry names, data or not.
    pub fn host_offset(&self) -> Option<HostOffset> {
        match *self {
            Mapping::Data(offset) | Mapping::ZeroAllocated(offset) => Some(offset),
            _ => None,
        }
    }
}

/// An entry of an L2 table (standard, 64 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(pub u64);

impl L2Entry {
    /// The backing file decides.
    pub const UNALLOCATED: L2Entry = L2Entry(0);
    /// Zeroes without space (version 3).
    pub const ZERO: L2Entry = L2Entry(ZERO);

    /// Data in a cluster whose refcount is 1.
    pub fn data(offset: HostOffset) -> L2Entry {
        L2Entry(offset.0 | COPIED)
    }

    /// Zeroes with a cluster kept whose refcount is 1 (version 3).
    pub fn zero_allocated(offset: HostOffset) -> L2Entry {
        L2Entry(offset.0 | COPIED | ZERO)
    }

    /// What it says.
    pub fn mapping(self, geometry: &Geometry) -> Mapping {
        if self.0 & COMPRESSED != 0 {
            return Mapping::Compressed(self.compressed(geometry));
        }
        let offset = HostOffset(self.0 & OFFSET_MASK);
        match (self.0 & ZERO != 0, offset.0 != 0) {
            (false, false) => Mapping::Unallocated,
            (true, false) => Mapping::Zero,
            (true, true) => Mapping::ZeroAllocated(offset),
            (false, true) => Mapping::Data(offset),
        }
    }

    /// The cluster may be written in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same mapping of a cluster of its own, which may be changed in place or not.
    pub fn with_copied(self, copied: bool) -> L2Entry {
        L2Entry(with_copied(self.0, copied))
    }

    /// The zero bit is set (reserved before version 3).
    pub fn has_zero_flag(self) -> bool {
        self.0 & (COMPRESSED | ZERO) == ZERO
    }

    /// Bits that the specification wants to be 0.
    pub fn reserved(self) -> u64 {
        if self.0 & COMPRESSED != 0 {
            self.0 & COPIED
        } else {
            self.0 & !(COPIED | OFFSET_MASK | ZERO)
        }
    }

    /// Compressed data of `length` bytes, which is not 0 and for which this holds.
    pub fn compressed_at(geometry: &Geometry, offset: HostOffset, length: u64) -> L2Entry {
        assert!(
            L2Entry::holds_compressed(geometry, offset, length),
            "{offset}+{length:#x}"
        );
        let sectors = (offset.0 + length - 1) / COMPRESSED_SECTOR - offset.0 / COMPRESSED_SECTOR;
        L2Entry(COMPRESSED | sectors << L2Entry::split(geometry) | offset.0)
    }

    /// An entry can name these compressed bytes.
    pub fn holds_compressed(geometry: &Geometry, offset: HostOffset, length: u64) -> bool {
        let end = offset.0.checked_add(length);
        end.is_some_and(|end| end <= 1 << L2Entry::split(geometry).min(56))
    }

    /// Where the number of sectors begins in the entry of compressed data.
    fn split(geometry: &Geometry) -> u32 {
        62 - (geometry.cluster_bits - 8)
    }

    /// Offset in bits 0 to x-1, additional sectors in bits x to 61, where x = 62 - (cluster_bits - 8).
    fn compressed(self, geometry: &Geometry) -> CompressedExtent {
        let split = L2Entry::split(geometry);
        let offset = self.0 & ((1 << split) - 1);
        let sectors = (self.0 & (COMPRESSED - 1)) >> split;
        let end = (offset & !(COMPRESSED_SECTOR - 1)) + (sectors + 1) * COMPRESSED_SECTOR;
        CompressedExtent {
            offset: HostOffset(offset),
            length: end - offset,
        }
    }
}

/// Reads refcount number `index` of a refcount block (or a part of one), `1 << order` bits wide.
pub fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let position = index * bits;
            u64::from(block[position / 8] >> (position % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let width = 1usize << (order - 3);
            let bytes = &block[index * width..][..width];
            bytes
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Sets refcount number `index` of a refcount block (or a part of one); `value` must fit.
pub fn set_refcount(block: &mut [u8], index: usize, order: u32, value: u64) {
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let position = index * bits;
            let shift = position % 8;
            let mask = ((1u16 << bits) - 1) as u8;
            assert!(value <= u64::from(mask), "refcount {value} in {bits} bits");
            let byte = &mut block[position / 8];
            *byte = (*byte & !(mask << shift)) | ((value as u8) << shift);
        }
        _ => {
            let width = 1usize << (order - 3);
            let fits = width == 8 || value >> (width * 8) == 0;
            assert!(fits, "refcount {value} in {width} bytes");
            block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_do_not_touch_their_neighbours() {
        for order in 0..=6 {
            let max = Geometry {
                cluster_bits: 9,
                refcount_order: order,
            }
            .refcount_max();
            let mut block = vec![0; 64];
            for index in 0..8 {
                set_refcount(&mut block, index, order, max);
            }
            set_refcount(&mut block, 3, order, 0);
            set_refcount(&mut block, 5, order, 1);
            let back: Vec<u64> = (0..9)
                .map(|index| refcount(&block, index % 8, order))
                .collect();
            assert_eq!(
                back,
                [max, max, max, 0, max, 1, max, max, max],
                "order {order}"
            );
        }
    }

    #[test]
    fn a_compressed_entry_counts_additional_sectors() {
        let geometry = Geometry {
            cluster_bits: 16,
            refcount_order: 4,
        };
        let entry = L2Entry(COMPRESSED | 2 << 54 | 0x5_0123);
        let Mapping::Compressed(extent) = entry.mapping(&geometry) else {
            panic!("{entry:?} is compressed");
        };
        assert_eq!(extent.offset, HostOffset(0x5_0123));
        assert_eq!(extent.offset.0 + extent.length, 0x5_0000 + 3 * 512);
        assert_eq!(extent.sectors(), ByteRange::between(0x5_0000, 0x5_0600));
    }

    #[test]
    fn compressed_entries_cover_their_bytes_and_no_more_sectors() {
        for cluster_bits in [9, 12, 16, 21] {
            let geometry = Geometry {
                cluster_bits,
                refcount_order: 4,
            };
            let most = (1 << cluster_bits) - 1;
            for (offset, length) in [
                (0x10_0000, 1),
                (0x10_01ff, 1),
                (0x10_01ff, 2),
                (0x10_0123, most),
            ] {
                let entry = L2Entry::compressed_at(&geometry, HostOffset(offset), length);
                let Mapping::Compressed(extent) = entry.mapping(&geometry) else {
                    panic!("{entry:?} is compressed");
                };
                assert_eq!(extent.offset, HostOffset(offset));
                let end = offset + extent.length;
                assert!(
                    end >= offset + length && end - (offset + length) < 512,
                    "{extent:?}"
                );
                assert_eq!(entry.reserved(), 0);
            }
        }
    }

    #[test]
    fn entries_say_what_they_were_made_to_say() {
        let geometry = Geometry {
            cluster_bits: 16,
            refcount_order: 4,
        };
        let offset = HostOffset(0x30_0000);
        assert_eq!(
            L2Entry::data(offset).mapping(&geometry),
            Mapping::Data(offset)
        );
        let zero = L2Entry::zero_allocated(offset);
        assert_eq!(zero.mapping(&geometry), Mapping::ZeroAllocated(offset));
        assert_eq!(L2Entry::ZERO.mapping(&geometry), Mapping::Zero);
        assert!(zero.is_copied() && zero.reserved() == 0);
        assert_eq!(L1Entry::table(offset).offset(), Some(offset));
        assert_eq!(L2Entry(1 << 57 | 4).reserved(), 1 << 57 | 4);
    }
}

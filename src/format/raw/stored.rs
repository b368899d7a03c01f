//! What the file beside a raw image says, in bytes.
//!
//! A header of 64 bytes: magic, version, the length of the body, and a digest of all that. The body: the image,
//! its size, and its bitmaps with their bits. Then, from the next sector on, as many slots of 64 bytes as there
//! may be marks: each is empty, or names a range that may have been changed since the rest was written, with a
//! digest that ties it to that. All numbers are little-endian. The length of the file follows from the header, so
//! that nothing can be cut off unnoticed.

use sha2::{Digest, Sha256};

use crate::block::{Bitmap, DirtyBitmap};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::parse::Reader;

const MAGIC: &[u8; 8] = b"lblkbits";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const SECTOR: usize = 512;
const SLOT: usize = 64;
/// Marks that fit.
pub(super) const SLOTS: usize = 256;
/// Most bits of all bitmaps together: 128 MiB.
pub(super) const MOST_BITS: u64 = 1 << 30;
const MOST_BITMAPS: usize = 65535;

const IN_USE: u8 = 1;
const ENABLED: u8 = 1;
const INCONSISTENT: u8 = 2;
const AS_WORDS: u8 = 0;
const AS_RUNS: u8 = 1;

type Sum = [u8; 32];

/// What is stored, but for marks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// Which image it is of.
    pub(super) identity: String,
    /// What was known of its last change, where it is not in use.
    pub(super) stamp: String,
    /// It is being written, or was when the writer ended.
    pub(super) in_use: bool,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes that it has at least, where it is in use.
    pub(super) least_size: u64,
    pub(super) entries: Vec<Entry>,
}

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) enabled: bool,
    pub(super) inconsistent: bool,
    pub(super) bits: DirtyBitmap,
}

/// Where marks go after what was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slots {
    sum: Sum,
    start: u64,
    used: usize,
}

/// What has been marked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Marks {
    Ranges(Vec<ByteRange>),
    /// They cannot be read.
    Damaged,
}

impl Stored {
    /// The bytes of the file, and where its marks go.
    pub(super) fn encode(&self) -> Result<(Vec<u8>, Slots)> {
        let body = self.encode_body()?;
        let mut bytes = Vec::with_capacity(HEADER + body.len() + SLOTS * SLOT);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.resize(HEADER - size_of::<Sum>(), 0);
        let sum = sum_of(&[&bytes, &body]);
        bytes.extend(sum);
        bytes.extend(body);
        let start = bytes.len().next_multiple_of(SECTOR);
        bytes.resize(start + SLOTS * SLOT, 0);
        let slots = Slots {
            sum,
            start: start as u64,
            used: 0,
        };
        Ok((bytes, slots))
    }

    fn encode_body(&self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        put_text(&mut body, &self.identity);
        put_text(&mut body, &self.stamp);
        body.push(if self.in_use { IN_USE } else { 0 });
        body.extend(self.size.to_le_bytes());
        body.extend(self.least_size.to_le_bytes());
        body.extend((self.entries.len() as u32).to_le_bytes());
        let mut bits = 0;
        for entry in &self.entries {
            bits += entry.bits.size().div_ceil(entry.bits.granularity());
            put_entry(&mut body, entry);
        }
        if bits > MOST_BITS || self.entries.len() > MOST_BITMAPS {
            let message = "Too much space would be occupied by bitmaps. Use larger granularity";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        Ok(body)
    }

    /// What the bytes of a file say.
    ///
    /// # Errors
    /// It is damaged, or of another version.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Stored, Slots, Marks)> {
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(damaged("it does not begin as one"));
        }
        let version = reader.u32()?;
        if version != VERSION {
            let message = format!("version {version} is not known, only {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        reader.take(4)?;
        let length = usize::try_from(reader.u64()?).unwrap_or(usize::MAX);
        let whole = length.checked_add(HEADER);
        let start = whole.and_then(|whole| whole.checked_next_multiple_of(SECTOR));
        let start = start.ok_or_else(|| damaged("its length is not possible"))?;
        if start.checked_add(SLOTS * SLOT) != Some(bytes.len()) {
            return Err(damaged("it has another length than it says"));
        }
        let body = &bytes[HEADER..HEADER + length];
        let sum = sum_of(&[&bytes[..HEADER - size_of::<Sum>()], body]);
        if bytes[HEADER - size_of::<Sum>()..HEADER] != sum {
            return Err(damaged("its digest is wrong"));
        }
        let stored = Stored::decode_body(body)?;
        let (slots, marks) = read_slots(sum, start, &bytes[start..]);
        Ok((stored, slots, marks))
    }

    fn decode_body(body: &[u8]) -> Result<Stored> {
        let mut reader = Reader::new(body);
        let mut stored = Stored {
            identity: reader.text()?,
            stamp: reader.text()?,
            in_use: reader.flags(IN_USE)? & IN_USE != 0,
            size: reader.u64()?,
            least_size: reader.u64()?,
            entries: Vec::new(),
        };
        let count = reader.u32()? as usize;
        if count > MOST_BITMAPS {
            return Err(damaged("it has too many bitmaps"));
        }
        let mut left = MOST_BITS;
        for _ in 0..count {
            let entry = read_entry(&mut reader, stored.size, &mut left)?;
            if stored.entries.iter().any(|other| other.name == entry.name) {
                return Err(damaged("a bitmap is there twice"));
            }
            stored.entries.push(entry);
        }
        reader.end()?;
        Ok(stored)
    }
}

impl Slots {
    /// The next mark: where in the file, and its bytes. `None`: there is no room.
    pub(super) fn next(&self, range: ByteRange) -> Option<(u64, Vec<u8>)> {
        let offset = self.start + (self.used * SLOT) as u64;
        (self.used < SLOTS).then(|| (offset, slot(&self.sum, self.used, range)))
    }

    /// The next mark is durable.
    pub(super) fn advance(&mut self) {
        self.used += 1;
    }
}

fn slot(sum: &Sum, number: usize, range: ByteRange) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SLOT);
    bytes.extend(range.start().to_le_bytes());
    bytes.extend(range.end().to_le_bytes());
    bytes.extend((number as u64 + 1).to_le_bytes());
    bytes.resize(SLOT - size_of::<Sum>(), 0);
    let own = sum_of(&[sum, &bytes]);
    bytes.extend(own);
    bytes
}

/// Marks stand one after the other. What is there after an empty slot, or is no mark, may have been one.
fn read_slots(sum: Sum, start: usize, bytes: &[u8]) -> (Slots, Marks) {
    let mut slots = Slots {
        sum,
        start: start as u64,
        used: 0,
    };
    let mut ranges = Vec::new();
    let mut rest = bytes.chunks_exact(SLOT);
    for bytes in rest.by_ref() {
        if bytes.iter().all(|byte| *byte == 0) {
            break;
        }
        let number = |at: usize| {
            bytes[at..at + 8]
                .iter()
                .rev()
                .fold(0, |n, b| n << 8 | u64::from(*b))
        };
        let (from, to) = (number(0), number(8));
        let is_range = from < to;
        if !is_range || slot(&sum, slots.used, ByteRange::between(from, to)) != bytes {
            return (slots, Marks::Damaged);
        }
        ranges.push(ByteRange::between(from, to));
        slots.advance();
    }
    if rest.any(|bytes| bytes.iter().any(|byte| *byte != 0)) {
        return (slots, Marks::Damaged);
    }
    (slots, Marks::Ranges(ranges))
}

fn sum_of(parts: &[&[u8]]) -> Sum {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
    }
    digest.finalize().into()
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    body.extend((text.len() as u32).to_le_bytes());
    body.extend(text.as_bytes());
}

fn put_entry(body: &mut Vec<u8>, entry: &Entry) {
    put_text(body, &entry.name);
    let mut flags = 0;
    if entry.enabled {
        flags |= ENABLED;
    }
    if entry.inconsistent {
        flags |= INCONSISTENT;
    }
    body.extend([flags, entry.bits.granularity().trailing_zeros() as u8]);
    let words = entry.bits.words();
    let runs = entry.bits.runs().count();
    if runs * 2 < words.len() {
        body.push(AS_RUNS);
        body.extend((runs as u64).to_le_bytes());
        for run in entry.bits.runs() {
            body.extend(run.start().to_le_bytes());
            body.extend(run.end().to_le_bytes());
        }
    } else {
        body.push(AS_WORDS);
        body.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }
}

fn read_entry(reader: &mut Reader<'_>, size: u64, left: &mut u64) -> Result<Entry> {
    let name = reader.text()?;
    if name.is_empty() || name.len() > Bitmap::LONGEST_NAME {
        return Err(damaged("a bitmap's name is not possible"));
    }
    let flags = reader.flags(ENABLED | INCONSISTENT)?;
    let granularity_bits = reader.u8()?;
    if !(9..=31).contains(&granularity_bits) {
        return Err(damaged("a bitmap's granularity is not possible"));
    }
    let granularity = 1 << granularity_bits;
    let count = size.div_ceil(granularity);
    *left = left
        .checked_sub(count)
        .ok_or_else(|| damaged("its bitmaps are too large"))?;
    let mut bits = DirtyBitmap::new(size, granularity);
    read_bits(reader, &mut bits)?;
    Ok(Entry {
        name,
        enabled: flags & ENABLED != 0,
        inconsistent: flags & INCONSISTENT != 0,
        bits,
    })
}

fn read_bits(reader: &mut Reader<'_>, bits: &mut DirtyBitmap) -> Result<()> {
    match reader.u8()? {
        AS_WORDS => {
            let mut words = Vec::with_capacity(bits.words().len());
            for _ in 0..bits.words().len() {
                words.push(reader.u64()?);
            }
            bits.set_words(0, &words);
        }
        AS_RUNS => {
            for _ in 0..reader.u64()? {
                let (start, end) = (reader.u64()?, reader.u64()?);
                if start >= end || end > bits.size() {
                    return Err(damaged("a run of bits is not possible"));
                }
                bits.set(ByteRange::between(start, end));
            }
        }
        _ => return Err(damaged("bits are written in an unknown way")),
    }
    Ok(())
}

pub(super) fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::InvalidImage, format!("damaged: {what}"))
}

#[cfg(test)]
#[path = "stored_tests.rs"]
mod tests;

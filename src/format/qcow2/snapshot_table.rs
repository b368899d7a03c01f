//! The table of internal snapshots: what each entry says of its snapshot.
//!
//! Entries that are there are kept as they are, with extra data that means nothing here.

use crate::block::Child;
use crate::buffer::MemorySlice;
use crate::error::{Error, ErrorKind, Result};

use super::header::{Header, invalid};
use super::layout::{HostOffset, MAX_L1_BYTES};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most extra data that is read; more is refused, as QEMU does.
const MOST_EXTRA: u32 = 1024;
/// Most bytes of a table.
const MOST_BYTES: u64 = 64 << 20;
/// Most snapshots of an image, as in QEMU.
const MOST_SNAPSHOTS: usize = 65536;
/// Most bytes of a name, as in QEMU.
const MOST_NAME: usize = 255;
/// Bytes of extra data of a new entry: size of the machine state, size of the disk, instructions.
const NEW_EXTRA: usize = 24;
/// Instructions were not counted.
const NOT_COUNTED: u64 = u64::MAX;
/// Most bytes of the L1 tables of all snapshots of an image that is written.
const MOST_L1_BYTES: u64 = 1 << 30;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// Unique id, a number as text.
    pub id: String,
    /// Name for people.
    pub name: String,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// Nanoseconds that the guest had run.
    pub vm_clock: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Instructions that the guest had run, where they were counted.
    pub instructions: Option<u64>,
    /// Size of the disk; entries of version 2 do not say it.
    pub disk_size: Option<u64>,
    /// Its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its entry in the table, padded.
    entry: Vec<u8>,
}

impl InternalSnapshot {
    /// A snapshot of a disk without a machine.
    ///
    /// # Errors
    /// No name, or one that is too long.
    pub(super) fn new(
        name: &str,
        id: u64,
        date: (u32, u32),
        disk_size: u64,
    ) -> Result<InternalSnapshot> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::InvalidArgument, message));
        if name.is_empty() {
            return refuse("Name is empty");
        }
        if name.len() > MOST_NAME {
            return refuse("Name is too long: a snapshot's has 255 bytes at most");
        }
        Ok(InternalSnapshot {
            id: id.to_string(),
            name: name.to_owned(),
            date,
            vm_clock: 0,
            vm_state_size: 0,
            instructions: None,
            disk_size: Some(disk_size),
            l1_offset: HostOffset(0),
            l1_entries: 0,
            entry: Vec::new(),
        })
    }

    /// Where its L1 table lies; makes its entry.
    pub(super) fn place_l1(&mut self, offset: HostOffset, entries: u32) {
        (self.l1_offset, self.l1_entries) = (offset, entries);
        let mut entry = Vec::with_capacity(FIXED + NEW_EXTRA + self.id.len() + self.name.len() + 7);
        entry.extend(offset.0.to_be_bytes());
        entry.extend(entries.to_be_bytes());
        entry.extend((self.id.len() as u16).to_be_bytes());
        entry.extend((self.name.len() as u16).to_be_bytes());
        entry.extend(self.date.0.to_be_bytes());
        entry.extend(self.date.1.to_be_bytes());
        entry.extend(self.vm_clock.to_be_bytes());
        entry.extend(0_u32.to_be_bytes());
        entry.extend((NEW_EXTRA as u32).to_be_bytes());
        entry.extend(self.vm_state_size.to_be_bytes());
        entry.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        entry.extend(self.instructions.unwrap_or(NOT_COUNTED).to_be_bytes());
        entry.extend(self.id.as_bytes());
        entry.extend(self.name.as_bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        self.entry = entry;
    }

    /// Its L1 table as offset and bytes.
    pub(super) fn l1_place(&self) -> (HostOffset, u64) {
        (self.l1_offset, u64::from(self.l1_entries) * 8)
    }
}

/// An id that none of these has: one more than the largest.
pub(super) fn new_id(snapshots: &[InternalSnapshot]) -> u64 {
    let ids = snapshots
        .iter()
        .filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
    ids.max().unwrap_or(0).saturating_add(1)
}

/// The table with these entries.
///
/// # Errors
/// It would be larger than it may be.
pub(super) fn serialise(snapshots: &[InternalSnapshot]) -> Result<Vec<u8>> {
    let bytes: Vec<u8> = snapshots
        .iter()
        .flat_map(|snapshot| snapshot.entry.iter().copied())
        .collect();
    if snapshots.len() > MOST_SNAPSHOTS || bytes.len() as u64 > MOST_BYTES {
        let message = "There is no room for another snapshot";
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    Ok(bytes)
}

/// Bytes of the table.
pub(super) fn bytes_of(snapshots: &[InternalSnapshot]) -> u64 {
    snapshots
        .iter()
        .map(|snapshot| snapshot.entry.len() as u64)
        .sum()
}

/// Reads the table that the header names, from the image's file.
///
/// # Errors
/// The table is malformed; what the file says.
pub async fn read_snapshots(file: &Child, header: &Header) -> Result<Vec<InternalSnapshot>> {
    let start = header.snapshots_offset.0;
    let mut offset = start;
    let mut snapshots = Vec::new();
    for _ in 0..header.snapshots {
        let fixed = read(file, offset, FIXED).await?;
        let lengths = Lengths::of(&fixed)?;
        let rest = read(file, offset + FIXED as u64, lengths.sum()).await?;
        let snapshot = parse(&fixed, &rest, &lengths);
        offset += snapshot.entry.len() as u64;
        snapshots.push(snapshot);
        if offset - start > MOST_BYTES {
            return Err(invalid("Snapshot table is too large"));
        }
    }
    Ok(snapshots)
}

/// What the snapshots take in a file of `size` bytes beside L2 tables and data: their table and their L1 tables,
/// as offsets and bytes.
///
/// # Errors
/// An L1 table does not lie in the file, or they are larger together than any sensible image has them.
pub(super) fn places(
    snapshots: &[InternalSnapshot],
    header: &Header,
    size: u64,
) -> Result<Vec<(HostOffset, u64)>> {
    let mut places = Vec::new();
    places.push((header.snapshots_offset, bytes_of(snapshots)));
    let mut left = MOST_L1_BYTES;
    for snapshot in snapshots {
        let (offset, bytes) = snapshot.l1_place();
        let end = offset.0.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= size);
        if !inside || bytes > MAX_L1_BYTES.min(left) || header.geometry.in_cluster(offset.0) != 0 {
            let message = format!(
                "Snapshot '{}' has an invalid L1 table at {offset} of {bytes:#x} bytes",
                snapshot.name
            );
            return Err(invalid(message));
        }
        left -= bytes;
        places.push((offset, bytes));
    }
    places.retain(|(_, bytes)| *bytes > 0);
    Ok(places)
}

async fn read(file: &Child, offset: u64, length: usize) -> Result<Vec<u8>> {
    let bytes = MemorySlice::zeroed(length);
    file.read(offset, bytes.clone().into()).await?;
    Ok(bytes.to_vec())
}

/// Bytes of the parts of an entry that follow its fixed fields.
struct Lengths {
    extra: usize,
    id: usize,
    name: usize,
}

impl Lengths {
    fn of(fixed: &[u8]) -> Result<Lengths> {
        let extra = number(fixed, 36, 4) as u32;
        if extra > MOST_EXTRA {
            return Err(invalid("Too much extra metadata in snapshot table entry"));
        }
        Ok(Lengths {
            extra: extra as usize,
            id: number(fixed, 12, 2) as usize,
            name: number(fixed, 14, 2) as usize,
        })
    }

    fn sum(&self) -> usize {
        self.extra + self.id + self.name
    }
}

fn parse(fixed: &[u8], rest: &[u8], lengths: &Lengths) -> InternalSnapshot {
    let (extra, names) = rest.split_at(lengths.extra);
    let (id, name) = names.split_at(lengths.id);
    let more = |at: usize| (extra.len() >= at + 8).then(|| number(extra, at, 8));
    let mut entry = [fixed, rest].concat();
    entry.resize(entry.len().next_multiple_of(8), 0);
    InternalSnapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        date: (number(fixed, 16, 4) as u32, number(fixed, 20, 4) as u32),
        vm_clock: number(fixed, 24, 8),
        vm_state_size: more(0).unwrap_or(number(fixed, 32, 4)),
        instructions: more(16).filter(|count| *count != NOT_COUNTED),
        disk_size: more(8),
        l1_offset: HostOffset(number(fixed, 0, 8)),
        l1_entries: number(fixed, 8, 4) as u32,
        entry,
    }
}

/// A big-endian number of so many bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = &bytes[at..at + length];
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_without_extra_data_has_a_short_state_size() {
        let mut fixed = [0; FIXED];
        fixed[13] = 1;
        fixed[15] = 2;
        fixed[35] = 9;
        let lengths = Lengths::of(&fixed).expect("valid");
        let snapshot = parse(&fixed, b"7ab", &lengths);
        assert_eq!((snapshot.id.as_str(), snapshot.name.as_str()), ("7", "ab"));
        assert_eq!((snapshot.vm_state_size, snapshot.instructions), (9, None));
        fixed[37] = 1;
        assert!(Lengths::of(&fixed).is_err());
    }

    #[test]
    fn a_new_entry_says_what_it_was_made_of() {
        let mut made = InternalSnapshot::new("s\u{e4}", 17, (3, 4), 1 << 40).expect("a good name");
        made.place_l1(HostOffset(5 << 16), 6);
        let (fixed, rest) = made.entry.split_at(FIXED);
        let lengths = Lengths::of(fixed).expect("valid");
        assert_eq!(parse(fixed, &rest[..lengths.sum()], &lengths), made);
        assert_eq!(new_id(&[made.clone(), made]), 18);
        assert!(InternalSnapshot::new("", 1, (0, 0), 0).is_err());
        assert!(InternalSnapshot::new(&"n".repeat(256), 1, (0, 0), 0).is_err());
    }
}

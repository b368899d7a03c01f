//! The table of internal snapshots: what each entry says of its snapshot. Only read here.

use crate::block::Child;
use crate::buffer::MemorySlice;
use crate::error::Result;

use super::header::{Header, invalid};
use super::layout::{HostOffset, MAX_L1_BYTES};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most extra data that is read; more is refused, as QEMU does.
const MOST_EXTRA: u32 = 1024;
/// Most bytes of a table.
const MOST_BYTES: u64 = 64 << 20;
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
    /// Bytes of its entry in the table.
    bytes: u64,
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
        offset += snapshot.bytes;
        snapshots.push(snapshot);
        if offset - start > MOST_BYTES {
            return Err(invalid("Snapshot table is too large"));
        }
    }
    Ok(snapshots)
}

/// What the snapshots take in the file beside L2 tables and data: their table and their L1 tables, as
/// offsets and bytes.
///
/// # Errors
/// An L1 table does not lie in the file, or they are larger together than any sensible image has them;
/// what the table's reading says.
pub(super) async fn places(file: &Child, header: &Header) -> Result<Vec<(HostOffset, u64)>> {
    let snapshots = read_snapshots(file, header).await?;
    let mut places = Vec::new();
    let table_bytes = snapshots.iter().map(|snapshot| snapshot.bytes).sum();
    places.push((header.snapshots_offset, table_bytes));
    let mut left = MOST_L1_BYTES;
    for snapshot in &snapshots {
        let (offset, bytes) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
        let end = offset.0.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= file.node().size());
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
    InternalSnapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        date: (number(fixed, 16, 4) as u32, number(fixed, 20, 4) as u32),
        vm_clock: number(fixed, 24, 8),
        vm_state_size: more(0).unwrap_or(number(fixed, 32, 4)),
        instructions: more(16).filter(|count| *count != u64::MAX),
        disk_size: more(8),
        l1_offset: HostOffset(number(fixed, 0, 8)),
        l1_entries: number(fixed, 8, 4) as u32,
        bytes: ((FIXED + lengths.sum()) as u64).next_multiple_of(8),
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
}

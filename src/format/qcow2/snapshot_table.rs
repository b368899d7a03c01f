//! The table of internal snapshots: what each entry says of its snapshot. Only read here.

use crate::block::Child;
use crate::buffer::MemorySlice;
use crate::error::Result;

use super::header::{Header, invalid};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most extra data that is read; more is refused, as QEMU does.
const MOST_EXTRA: u32 = 1024;
/// Most bytes of a table.
const MOST_BYTES: u64 = 64 << 20;

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
        snapshots.push(parse(&fixed, &rest, &lengths));
        offset += ((FIXED + lengths.sum()) as u64).next_multiple_of(8);
        if offset - start > MOST_BYTES {
            return Err(invalid("Snapshot table is too large"));
        }
    }
    Ok(snapshots)
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

//! Filling new clusters: the payload's bytes, and around them what the guest saw there before.
//!
//! Nothing is read that the payload covers, and nothing is written that already reads as it should:
//! clusters past the old end of the file are zero.

use crate::block::{DebugEvent, WriteFlags, ZeroFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::join::{Piece, join};
use super::layout::{CompressedExtent, HostOffset, Mapping};

/// Clusters up to this many bytes together are put together in memory and written at once.
const MOST_MERGED: u64 = 128 * 1024;

/// What the guest saw in a cluster before it was written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Zero,
    Backing,
    Compressed(CompressedExtent),
    /// Clusters that others use too, from here on.
    Shared(HostOffset),
}

impl Source {
    pub(super) fn of(mapping: Mapping) -> Source {
        match mapping {
            Mapping::Unallocated => Source::Backing,
            Mapping::Zero | Mapping::ZeroAllocated(_) => Source::Zero,
            Mapping::Compressed(extent) => Source::Compressed(extent),
            Mapping::Data(host) => Source::Shared(host),
        }
    }
}

/// Host clusters to be filled.
pub(super) struct Fill {
    /// The guest clusters, whole.
    pub(super) outer: ByteRange,
    /// The guest bytes of the payload.
    pub(super) written: ByteRange,
    /// Where the first cluster lies in the file.
    pub(super) host: HostOffset,
    /// The host clusters read as zeroes now.
    pub(super) is_zero: bool,
    pub(super) source: Source,
    pub(super) payload: Payload,
}

impl Fill {
    fn head(&self) -> ByteRange {
        ByteRange::between(self.outer.start(), self.written.start())
    }

    fn tail(&self) -> ByteRange {
        ByteRange::between(self.written.end(), self.outer.end())
    }

    /// Where a guest byte goes.
    fn host_of(&self, guest: u64) -> u64 {
        self.host.plus(guest - self.outer.start()).0
    }
}

impl Qcow2 {
    /// Fills clusters. When it fails, no I/O to them is in flight.
    pub(super) async fn fill_clusters(&self, fill: &Fill) -> Result<()> {
        let zero = match fill.source {
            Source::Zero => true,
            Source::Backing => !self.has_backing_data(fill),
            _ => false,
        };
        let whole = fill.head().is_empty() && fill.tail().is_empty();
        if whole || (zero && fill.is_zero) {
            self.write_payload(fill).await
        } else if fill.outer.length() <= MOST_MERGED {
            self.fill_merged(fill, zero).await
        } else {
            self.fill_apart(fill, zero).await
        }
    }

    fn has_backing_data(&self, fill: &Fill) -> bool {
        let size = self.backing().map_or(0, |backing| backing.node().size());
        let (head, tail) = (fill.head(), fill.tail());
        let reaches = |range: ByteRange| !range.is_empty() && range.start() < size;
        reaches(head) || reaches(tail)
    }

    async fn write_payload(&self, fill: &Fill) -> Result<()> {
        let offset = fill.host_of(fill.written.start());
        let payload = fill.payload.clone();
        self.tell(DebugEvent::WriteAio);
        self.file()
            .write(offset, payload, WriteFlags::empty())
            .await
    }

    /// One buffer, one read (two where the payload lies between and is long), one write.
    async fn fill_merged(&self, fill: &Fill, zero: bool) -> Result<()> {
        let buffer = MemorySlice::zeroed(fill.outer.length() as usize);
        if !zero {
            self.tell(DebugEvent::CowRead);
            self.read_around(fill, &buffer).await?;
        }
        let at = (fill.written.start() - fill.outer.start()) as usize;
        let inside = buffer.slice(at, fill.payload.length());
        fill.payload.copy_out(0, &inside)?;
        let (head, tail) = (fill.head().length() as usize, fill.tail().length() as usize);
        let end = buffer.length() - tail;
        let skips = |start, length| fill.is_zero && buffer.slice(start, length).is_zero();
        let from = if skips(0, head) { head } else { 0 };
        let to = if skips(end, tail) {
            end
        } else {
            buffer.length()
        };
        let offset = fill.host.plus(from as u64).0;
        let payload = Payload::from(buffer.slice(from, to - from));
        self.tell(DebugEvent::CowWrite);
        self.tell(DebugEvent::WriteAio);
        self.file()
            .write(offset, payload, WriteFlags::empty())
            .await
    }

    /// Reads head and tail into their places.
    async fn read_around(&self, fill: &Fill, buffer: &MemorySlice) -> Result<()> {
        let (head, tail) = (fill.head(), fill.tail());
        let short = fill.written.length() < head.length().min(tail.length());
        let ranges = match (head.is_empty(), tail.is_empty()) {
            (false, false) if short => vec![fill.outer],
            _ => vec![head, tail],
        };
        let pieces = ranges.into_iter().filter(|range| !range.is_empty());
        let pieces = pieces.map(|range| {
            let start = (range.start() - fill.outer.start()) as usize;
            let part = buffer.slice(start, range.length() as usize);
            Box::pin(self.read_source(fill, range, part)) as Piece<'_>
        });
        join(pieces.collect()).await
    }

    /// What the guest saw in a range before.
    async fn read_source(&self, fill: &Fill, range: ByteRange, part: MemorySlice) -> Result<()> {
        let inside = range.start() - fill.outer.start();
        match fill.source {
            Source::Zero => {
                part.fill(0, part.length(), 0);
                Ok(())
            }
            Source::Backing => self.read_backing(range, part.into()).await,
            Source::Shared(host) => self.file().read(host.plus(inside).0, part.into()).await,
            Source::Compressed(extent) => {
                let cluster = self.read_compressed(extent).await?;
                part.copy_from(0, &cluster.slice(inside as usize, part.length()));
                Ok(())
            }
        }
    }

    /// The payload as it is; head and tail beside it.
    async fn fill_apart(&self, fill: &Fill, zero: bool) -> Result<()> {
        let mut pieces: Vec<Piece<'_>> = vec![Box::pin(self.write_payload(fill))];
        for edge in [fill.head(), fill.tail()] {
            if !edge.is_empty() {
                pieces.push(Box::pin(self.fill_edge(fill, edge, zero)));
            }
        }
        join(pieces).await
    }

    async fn fill_edge(&self, fill: &Fill, edge: ByteRange, zero: bool) -> Result<()> {
        let start = fill.host_of(edge.start());
        let place = ByteRange::between(start, start + edge.length());
        let mut is_zero = zero;
        let mut buffer = None;
        if !zero {
            let bytes = MemorySlice::zeroed(edge.length() as usize);
            self.tell(DebugEvent::CowRead);
            self.read_source(fill, edge, bytes.clone()).await?;
            is_zero = bytes.is_zero();
            buffer = Some(bytes);
        }
        if is_zero && fill.is_zero {
            return Ok(());
        }
        self.tell(DebugEvent::CowWrite);
        match buffer {
            Some(bytes) if !is_zero => {
                let empty = WriteFlags::empty();
                self.file().write(start, bytes.into(), empty).await
            }
            _ => self.file().write_zeroes(place, ZeroFlags::empty()).await,
        }
    }
}

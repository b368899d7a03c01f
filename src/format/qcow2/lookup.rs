//! From guest offsets to what the image has for them.

use crate::block::{DebugEvent, InFlight};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::Qcow2;
use super::layout::{GuestCluster, GuestOffset, HostOffset, L1Entry, L2Entry, Mapping};
use super::table::big_endian;

/// What a mapping is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To read what it names.
    Read,
    /// To write there.
    Write,
}

/// Guest bytes with one mapping; data is contiguous in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) range: ByteRange,
    /// Of the first cluster.
    pub(super) mapping: Mapping,
    /// What it names may be written in place.
    pub(super) copied: bool,
}

/// The answer of [`Qcow2::lookup`].
pub(super) enum Lookup {
    Run(Run),
    /// The slice with this key must be loaded first.
    Missing(u64),
}

impl Qcow2 {
    /// Log2 of the entries in a slice of an L2 table.
    pub(super) fn l2_slice_bits(&self) -> u32 {
        self.l2.slice_size().ilog2() - 3
    }

    /// The slice that has a guest cluster's entry.
    pub(super) fn l2_key(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_slice_bits()
    }

    /// Where an entry lies in its slice, in bytes.
    pub(super) fn l2_position(&self, cluster: GuestCluster) -> usize {
        ((cluster.0 as usize) & ((1 << self.l2_slice_bits()) - 1)) * 8
    }

    /// Guest bytes that a slice maps.
    pub(super) fn l2_slice_coverage(&self) -> u64 {
        1 << (self.l2_slice_bits() + self.geometry.cluster_bits)
    }

    pub(super) fn l1_entry(&self, cluster: GuestCluster) -> L1Entry {
        L1Entry(self.l1.borrow().entry(self.geometry.l1_index(cluster)))
    }

    /// Where a slice lies in the file; `None` where there is no L2 table.
    pub(super) fn l2_slice_offset(&self, key: u64) -> Option<HostOffset> {
        let cluster = GuestCluster(key << self.l2_slice_bits());
        let table = self.l1_entry(cluster).offset()?;
        Some(table.plus(self.geometry.l2_index(cluster) * 8))
    }

    /// The first run of a range that is not empty and lies within the disk. Does not wait: a caller
    /// that counts itself in the epoch right after it keeps what it found from being used again.
    pub(super) fn lookup(&self, range: ByteRange, purpose: Purpose) -> Result<Lookup> {
        let first = self.geometry.guest_cluster(GuestOffset(range.start()));
        let table = self.l1_entry(first);
        if table.offset().is_none() {
            let coverage = self.geometry.l2_coverage();
            let end = (range.start() & !(coverage - 1)).saturating_add(coverage);
            return Ok(Lookup::Run(Run {
                range: ByteRange::between(range.start(), range.end().min(end)),
                mapping: Mapping::Unallocated,
                copied: false,
            }));
        }
        let key = self.l2_key(first);
        let run = self.l2.with(key, |slice, suspect| {
            self.run_in_slice(slice, first, range, suspect.then_some(purpose))
        });
        match run {
            None => Ok(Lookup::Missing(key)),
            Some(run) => run.map(Lookup::Run),
        }
    }

    /// `checked`: entries of this slice need a look before they are used.
    fn run_in_slice(
        &self,
        slice: &[u8],
        first: GuestCluster,
        range: ByteRange,
        checked: Option<Purpose>,
    ) -> Result<Run> {
        let mut position = self.l2_position(first);
        let entry = L2Entry(big_endian(&slice[position..]));
        if let Some(purpose) = checked
            && let Some(message) = self.entry_fault(entry, first, purpose)
        {
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let cluster_size = self.geometry.cluster_size();
        let mapping = entry.mapping(&self.geometry);
        let step = match mapping {
            Mapping::Data(_) | Mapping::ZeroAllocated(_) => cluster_size,
            _ => 0,
        };
        let mut end = self.geometry.guest_offset(first).0 + cluster_size;
        let mut expected = entry.0;
        let single = matches!(mapping, Mapping::Compressed(_));
        while end < range.end() && !single {
            position += 8;
            expected += step;
            if position >= slice.len() || big_endian(&slice[position..]) != expected {
                break;
            }
            let cluster = self.geometry.guest_cluster(GuestOffset(end));
            if let Some(purpose) = checked
                && self
                    .entry_fault(L2Entry(expected), cluster, purpose)
                    .is_some()
            {
                break;
            }
            end += cluster_size;
        }
        Ok(Run {
            range: ByteRange::between(range.start(), range.end().min(end)),
            mapping,
            copied: entry.is_copied(),
        })
    }

    /// What is wrong with an entry, in QEMU's words.
    pub(super) fn entry_fault(
        &self,
        entry: L2Entry,
        cluster: GuestCluster,
        purpose: Purpose,
    ) -> Option<String> {
        let table = self.l1_entry(cluster).offset().unwrap_or_default();
        let index = self.geometry.l2_index(cluster);
        let place = format!("(L2 offset: {table}, L2 index: {index:#x})");
        if self.version < 3 && entry.has_zero_flag() {
            return Some(format!("Zero cluster entry found in pre-v3 image {place}"));
        }
        let mapping = entry.mapping(&self.geometry);
        let offset = mapping.host_offset()?;
        if self.geometry.in_cluster(offset.0) != 0 {
            let what = match mapping {
                Mapping::ZeroAllocated(_) => "Preallocated zero cluster",
                _ => "Cluster allocation",
            };
            return Some(format!("{what} offset {offset} unaligned {place}"));
        }
        let overlaps = self
            .metadata
            .borrow()
            .contains(self.geometry.host_cluster(offset));
        (overlaps && purpose == Purpose::Write)
            .then(|| format!("Preventing invalid write on metadata at offset {offset} {place}"))
    }

    /// [`Qcow2::lookup`], loading what is missing; counted in the epoch.
    pub(super) async fn find(&self, range: ByteRange, purpose: Purpose) -> Result<(Run, InFlight)> {
        loop {
            match self.lookup(range, purpose) {
                Ok(Lookup::Run(run)) => return Ok((run, self.epochs.enter())),
                Ok(Lookup::Missing(key)) => self.load_l2(key).await?,
                Err(error) => return Err(self.report_corruption(error).await),
            }
        }
    }

    /// Brings a slice of an L2 table that exists into the cache.
    pub(super) async fn load_l2(&self, key: u64) -> Result<()> {
        if self.l2.is_congested() {
            self.write_back(false).await?;
        }
        let Some(_loading) = self.l2.begin_load(key).await else {
            return Ok(());
        };
        let Some(offset) = self.l2_slice_offset(key) else {
            return Ok(());
        };
        let cluster = GuestCluster(key << self.l2_slice_bits());
        if self
            .geometry
            .in_cluster(self.l1_entry(cluster).offset().unwrap_or_default().0)
            != 0
        {
            let index = self.geometry.l1_index(cluster);
            let message = format!("L2 table offset {offset} unaligned (L1 index: {index:#x})");
            let error = Error::new(ErrorKind::Corrupt, message);
            return Err(self.report_corruption(error).await);
        }
        let _in_flight = self.epochs.enter();
        self.tell(DebugEvent::L2Load);
        let bytes = self.read_metadata(offset, self.l2.slice_size()).await?;
        let suspect = bytes.chunks_exact(8).enumerate().any(|(index, entry)| {
            let cluster = GuestCluster(cluster.0 + index as u64);
            self.is_suspect(L2Entry(big_endian(entry)), cluster)
        });
        self.l2.insert(key, bytes.into(), false, suspect);
        Ok(())
    }

    fn is_suspect(&self, entry: L2Entry, cluster: GuestCluster) -> bool {
        entry.0 != 0 && self.entry_fault_quick(entry) && {
            self.entry_fault(entry, cluster, Purpose::Write).is_some()
        }
    }

    /// Cheap, and true for every entry that [`Qcow2::entry_fault`] objects to.
    fn entry_fault_quick(&self, entry: L2Entry) -> bool {
        let mapping = entry.mapping(&self.geometry);
        let offset = mapping.host_offset().unwrap_or_default();
        (self.version < 3 && entry.has_zero_flag())
            || self.geometry.in_cluster(offset.0) != 0
            || self
                .metadata
                .borrow()
                .contains(self.geometry.host_cluster(offset))
    }
}

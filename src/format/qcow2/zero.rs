//! Write zeroes and discard: mappings without data.

use nix::errno::Errno;

use crate::block::{LockMode, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::range::{ByteRange, align_up};

use super::Qcow2;
use super::layout::{GuestCluster, GuestOffset, L2Entry, Mapping};
use super::lookup::Purpose;
use super::table::big_endian;

/// Freed ranges that may wait for the next flush before one is made for them.
const MOST_UNMAPPED: usize = 4096;

/// What becomes of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// They read as zeroes and take no space.
    Zero,
    /// They read as zeroes and keep the space they have.
    KeepZero,
    /// The backing file decides.
    Unallocated,
    /// As `Zero`, but what reads as zeroes anyway is left alone.
    Discarded,
}

impl Qcow2 {
    pub(super) async fn zero_guest(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.prepare_write().await?;
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let fate = match (self.version, unmap) {
            (3, true) => Fate::Zero,
            (3, false) => Fate::KeepZero,
            (_, true) if self.is_zero_below() => Fate::Unallocated,
            _ => {
                let message = "the zero flag is only supported by version 3 and newer";
                return Err(Error::from_errno(Errno::EOPNOTSUPP, message));
            }
        };
        let Some(whole) = self.whole_clusters(range) else {
            return self.zero_part(range).await;
        };
        let inside_end = whole.end().min(range.end());
        let inside_end = inside_end.max(whole.start());
        self.zero_part(ByteRange::between(range.start(), whole.start()))
            .await?;
        self.zero_part(ByteRange::between(inside_end, range.end()))
            .await?;
        self.set_fate(whole, fate).await
    }

    pub(super) async fn discard_guest(&self, range: ByteRange) -> Result<()> {
        self.prepare_write().await?;
        if self.version < 3 && self.backing().is_some() {
            return Ok(());
        }
        let fate = match (self.version, self.discard_no_unref) {
            (3, false) => Fate::Discarded,
            (3, true) => Fate::KeepZero,
            (_, true) => return Ok(()),
            _ => Fate::Unallocated,
        };
        match self.whole_clusters(range) {
            Some(whole) => self.set_fate(whole, fate).await,
            None => Ok(()),
        }
    }

    /// The clusters that lie in a range whole; the last one of the disk may be cut by its end.
    fn whole_clusters(&self, range: ByteRange) -> Option<ByteRange> {
        let cluster_size = self.geometry.cluster_size();
        let end = match range.end() == self.size.get() {
            true => align_up(range.end(), cluster_size).unwrap_or(range.end()),
            false => range.end(),
        };
        ByteRange::between(range.start(), end).align_inward(cluster_size)
    }

    /// Writes zeroes to a range that covers no cluster whole, where it does not read as zeroes yet.
    pub(super) async fn zero_part(&self, range: ByteRange) -> Result<()> {
        let mut start = range.start();
        while start < range.end() {
            let left = ByteRange::between(start, range.end());
            let (run, guard) = self.find(left, Purpose::Write).await?;
            drop(guard);
            let is_zero = match run.mapping {
                Mapping::Zero | Mapping::ZeroAllocated(_) => true,
                Mapping::Unallocated => self.is_zero_below(),
                _ => false,
            };
            if !is_zero {
                let zeroes = MemorySlice::zeroed(run.range.length() as usize);
                self.write_guest(start, zeroes.into()).await?;
            }
            start = run.range.end();
        }
        Ok(())
    }

    /// Gives clusters another fate, slice by slice.
    pub(super) async fn set_fate(&self, whole: ByteRange, fate: Fate) -> Result<()> {
        let coverage = self.l2_slice_coverage();
        let mut start = whole.start();
        while start < whole.end() {
            let first = self.geometry.guest_cluster(GuestOffset(start));
            let index = self.geometry.l1_index(first);
            let no_table = self.l1_entry(first).offset().is_none();
            if no_table && self.is_fate_of_unallocated(fate, start) {
                let table_end = (index as u64 + 1).saturating_mul(self.geometry.l2_coverage());
                start = table_end.min(whole.end());
                continue;
            }
            let end = ((start & !(coverage - 1)) + coverage).min(whole.end());
            self.set_fate_in_slice(ByteRange::between(start, end), fate)
                .await?;
            start = end;
        }
        if self.epochs.unmapped() > MOST_UNMAPPED {
            self.flush_all().await?;
        }
        Ok(())
    }

    /// There is no backing file, nor does the header name one that may be attached later.
    fn is_zero_below(&self) -> bool {
        self.backing().is_none() && self.header.borrow().backing.is_none()
    }

    /// Unallocated clusters from a guest offset on are what they should be.
    fn is_fate_of_unallocated(&self, fate: Fate, start: u64) -> bool {
        match fate {
            Fate::Unallocated => true,
            // A job may give the image a longer backing file: zeroes that were asked for are said here.
            Fate::Zero | Fate::KeepZero => self.is_zero_below(),
            Fate::Discarded => {
                let size = self.backing().map_or(0, |backing| backing.node().size());
                start >= size
            }
        }
    }

    async fn set_fate_in_slice(&self, range: ByteRange, fate: Fate) -> Result<()> {
        let _held = self.clusters.lock(range, LockMode::Exclusive).await;
        let first = self.geometry.guest_cluster(GuestOffset(range.start()));
        self.own_l2_table(self.geometry.l1_index(first)).await?;
        self.check_entries(range).await?;
        self.hold_l2(range.start()).await?;
        self.check_health()?;
        let count = range.length() >> self.geometry.cluster_bits;
        let start = self.l2_position(first);
        let key = self.l2_key(first);
        let entries: Option<Vec<L2Entry>> = self.l2.with(key, |slice, _| {
            let entries = slice[start..].chunks_exact(8).take(count as usize);
            entries.map(|entry| L2Entry(big_endian(entry))).collect()
        });
        let mut changes = Vec::new();
        for (index, entry) in entries.into_iter().flatten().enumerate() {
            let cluster = GuestCluster(first.0 + index as u64);
            let wanted = self.fate_of(cluster, entry, fate);
            if wanted != entry {
                changes.push((index, entry, wanted));
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.l2.change(key, |slice| {
            for (index, _, wanted) in &changes {
                slice[start + index * 8..][..8].copy_from_slice(&wanted.0.to_be_bytes());
            }
        });
        self.progress.changed(false);
        for (_, entry, wanted) in changes {
            let mapping = entry.mapping(&self.geometry);
            if wanted.mapping(&self.geometry).host_offset() != mapping.host_offset()
                || matches!(mapping, Mapping::Compressed(_))
            {
                self.unmap(mapping, 1, true);
            }
        }
        Ok(())
    }

    /// The entry that a guest cluster's entry becomes.
    fn fate_of(&self, cluster: GuestCluster, entry: L2Entry, fate: Fate) -> L2Entry {
        let mapping = entry.mapping(&self.geometry);
        let start = self.geometry.guest_offset(cluster).0;
        let reads_zero =
            mapping == Mapping::Unallocated && self.is_fate_of_unallocated(fate, start);
        match fate {
            Fate::Unallocated => L2Entry::UNALLOCATED,
            Fate::Zero | Fate::Discarded if reads_zero => entry,
            Fate::Zero | Fate::Discarded => L2Entry::ZERO,
            Fate::KeepZero => match mapping {
                Mapping::Unallocated if reads_zero => entry,
                Mapping::Data(host) if entry.is_copied() => L2Entry::zero_allocated(host),
                Mapping::ZeroAllocated(_) => entry,
                _ => L2Entry::ZERO,
            },
        }
    }

    /// Entries that must not be trusted are reported before anything is freed by them.
    async fn check_entries(&self, range: ByteRange) -> Result<()> {
        let mut start = range.start();
        while start < range.end() {
            let left = ByteRange::between(start, range.end());
            let (run, _) = self.find(left, Purpose::Write).await?;
            start = run.range.end();
        }
        Ok(())
    }

    /// Guest clusters from `first` on whose L2 tables are whole in the range.
    pub(super) fn tables_after(&self, first: GuestCluster) -> std::ops::Range<usize> {
        let entries = self.l1.borrow().length();
        let index = first.0.div_ceil(self.geometry.l2_entries()) as usize;
        index.min(entries)..entries
    }
}

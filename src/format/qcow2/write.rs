//! Writing guest data: in place, or into new clusters.
//!
//! New clusters are prepared (allocated, filled) and then committed (mapped), so that no reader sees
//! what they held before; a failed write changes no mapping. Writers that need a new cluster for the
//! same guest cluster take turns: the next one finds it mapped, and writes in place.

use crate::block::{DebugEvent, InFlight, LockMode, WriteFlags};
use crate::buffer::Payload;
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::cow::{Fill, Source};
use super::epochs::Freed;
use super::join::{Piece, join};
use super::layout::{GuestOffset, HostOffset, L1Entry, L2Entry, Mapping};
use super::lookup::{Purpose, Run};

/// How a run is to be written.
enum Plan {
    InPlace(Run, InFlight),
    /// Guest bytes whose clusters need a new mapping.
    Allocate(ByteRange),
}

impl Run {
    /// Its bytes may be written where they are.
    pub(super) fn is_in_place(&self) -> bool {
        matches!(self.mapping, Mapping::Data(_)) && self.copied
    }
}

impl Qcow2 {
    pub(super) async fn write_guest(&self, offset: u64, payload: Payload) -> Result<()> {
        self.prepare_write().await?;
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        let (run, guard) = self.find(range, Purpose::Write).await?;
        if run.range == range && run.is_in_place() {
            return self.write_in_place(run, guard, payload).await;
        }
        drop(guard);
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        for plan in self.plan_write(range).await? {
            let covered = match &plan {
                Plan::InPlace(run, _) => run.range,
                Plan::Allocate(range) => *range,
            };
            let start = (covered.start() - range.start()) as usize;
            let part = payload.slice(start, covered.length() as usize);
            pieces.push(match plan {
                Plan::InPlace(run, guard) => Box::pin(self.write_in_place(run, guard, part)),
                Plan::Allocate(range) => Box::pin(self.write_allocating(range, part)),
            });
        }
        join(pieces).await
    }

    async fn plan_write(&self, range: ByteRange) -> Result<Vec<Plan>> {
        let mut plans: Vec<Plan> = Vec::new();
        let mut start = range.start();
        while start < range.end() {
            let left = ByteRange::between(start, range.end());
            let (run, guard) = self.find(left, Purpose::Write).await?;
            start = run.range.end();
            if run.is_in_place() {
                plans.push(Plan::InPlace(run, guard));
            } else if let Some(Plan::Allocate(before)) = plans.last_mut() {
                *before = ByteRange::between(before.start(), start);
            } else {
                plans.push(Plan::Allocate(run.range));
            }
        }
        Ok(plans)
    }

    async fn write_in_place(&self, run: Run, guard: InFlight, payload: Payload) -> Result<()> {
        let _guard = guard;
        let Mapping::Data(host) = run.mapping else {
            unreachable!("{run:?} is written in place");
        };
        let offset = host.plus(self.geometry.in_cluster(run.range.start()));
        let empty = WriteFlags::empty();
        self.tell(DebugEvent::WriteAio);
        self.file().write(offset.0, payload, empty).await
    }

    /// Writes clusters that were not mapped to a place of their own a moment ago.
    async fn write_allocating(&self, range: ByteRange, payload: Payload) -> Result<()> {
        let outer = range.align_outward(self.geometry.cluster_size());
        let _held = self.clusters.lock(outer, LockMode::Exclusive).await;
        let mut start = range.start();
        while start < range.end() {
            let left = ByteRange::between(start, range.end());
            let (run, guard) = self.find(left, Purpose::Write).await?;
            let at = (start - range.start()) as usize;
            if run.is_in_place() {
                let part = payload.slice(at, run.range.length() as usize);
                self.write_in_place(run, guard, part).await?;
                start = run.range.end();
            } else {
                let part = payload.slice(at, payload.length() - at);
                start = self.write_new(run, part).await?;
            }
        }
        Ok(())
    }

    /// Gives the clusters of a run, or the first of them, a mapping with the payload's bytes. The
    /// caller holds their lock. Answers up to where.
    async fn write_new(&self, run: Run, payload: Payload) -> Result<u64> {
        let run = self.within_slice(run);
        let first = self.geometry.guest_cluster(GuestOffset(run.range.start()));
        self.own_l2_table(self.geometry.l1_index(first)).await?;
        let outer = run.range.align_outward(self.geometry.cluster_size());
        let wanted = outer.length() >> self.geometry.cluster_bits;
        if let (Mapping::ZeroAllocated(host), true) = (run.mapping, run.copied) {
            let fill = self.fill(run.range, host, false, Source::Zero, &payload);
            self.fill_clusters(&fill).await?;
            self.map(&run, fill.written, host).await?;
            return Ok(fill.written.end());
        }
        let allocation = self.allocate(wanted).await?;
        let host = self.geometry.host_offset(allocation.first);
        let length = allocation.count << self.geometry.cluster_bits;
        let end = run.range.end().min(outer.start() + length);
        let written = ByteRange::between(run.range.start(), end);
        let source = Source::of(run.mapping);
        let fill = self.fill(written, host, allocation.is_zero, source, &payload);
        let mut result = self.fill_clusters(&fill).await;
        if result.is_ok() {
            result = self.map(&run, written, host).await;
        }
        match result {
            Ok(()) => Ok(end),
            Err(error) => {
                self.release(allocation).await;
                Err(error)
            }
        }
    }

    /// As much of a run as one slice maps.
    fn within_slice(&self, run: Run) -> Run {
        let coverage = self.l2_slice_coverage();
        let end = (run.range.start() & !(coverage - 1)) + coverage;
        let range = ByteRange::between(run.range.start(), run.range.end().min(end));
        Run { range, ..run }
    }

    fn fill(
        &self,
        written: ByteRange,
        host: HostOffset,
        is_zero: bool,
        source: Source,
        payload: &Payload,
    ) -> Fill {
        Fill {
            outer: written.align_outward(self.geometry.cluster_size()),
            written,
            host,
            is_zero,
            source,
            payload: payload.slice(0, written.length() as usize),
        }
    }

    /// Maps the clusters of `written` to `host` on; what they were mapped to loses a reference.
    async fn map(&self, run: &Run, written: ByteRange, host: HostOffset) -> Result<()> {
        let outer = written.align_outward(self.geometry.cluster_size());
        let first = self.geometry.guest_cluster(GuestOffset(outer.start()));
        let count = outer.length() >> self.geometry.cluster_bits;
        self.hold_l2(first.0 << self.geometry.cluster_bits).await?;
        self.check_health()?;
        self.l2.change(self.l2_key(first), |slice| {
            let start = self.l2_position(first);
            for (index, place) in slice[start..]
                .chunks_exact_mut(8)
                .take(count as usize)
                .enumerate()
            {
                let offset = host.plus((index as u64) << self.geometry.cluster_bits);
                place.copy_from_slice(&L2Entry::data(offset).0.to_be_bytes());
            }
        });
        self.progress.changed(true);
        if run.mapping.host_offset() != Some(host) {
            self.unmap(run.mapping, count, false);
        }
        Ok(())
    }

    /// What `count` clusters from `mapping` on were mapped to loses a reference, once that is safe.
    pub(super) fn unmap(&self, mapping: Mapping, count: u64, discard: bool) {
        let range = match mapping {
            Mapping::Unallocated | Mapping::Zero => return,
            Mapping::Data(host) | Mapping::ZeroAllocated(host) => {
                let length = count << self.geometry.cluster_bits;
                ByteRange::between(host.0, host.0 + length)
            }
            Mapping::Compressed(extent) => {
                assert_eq!(count, 1, "compressed clusters come one by one");
                self.decompressed.borrow_mut().forget(extent.offset);
                extent.sectors()
            }
        };
        self.epochs.unmap(Freed { range, discard });
    }

    /// Loads the slice of an L2 table that exists; it is there until the next await.
    pub(super) async fn hold_l2(&self, guest_offset: u64) -> Result<()> {
        let cluster = self.geometry.guest_cluster(GuestOffset(guest_offset));
        let key = self.l2_key(cluster);
        while !self.l2.contains(key) {
            self.load_l2(key).await?;
        }
        Ok(())
    }

    /// Sees to it that there is an L2 table at this place of the L1 table, and that it may be changed.
    pub(super) async fn own_l2_table(&self, index: usize) -> Result<()> {
        if self.owns_l2_table(index) {
            return Ok(());
        }
        let _turn = self.tables.take().await;
        if self.owns_l2_table(index) {
            return Ok(());
        }
        let before = L1Entry(self.l1.borrow().entry(index)).offset();
        let allocation = self.allocate(1).await?;
        let offset = self.geometry.host_offset(allocation.first);
        let result = match before {
            None => {
                self.tell(DebugEvent::L2AllocWrite);
                self.zero_cluster(offset).await
            }
            Some(shared) => self.copy_cluster(shared, offset).await,
        };
        if let Err(error) = result {
            self.release(allocation).await;
            return Err(error);
        }
        self.check_health()?;
        self.l1.borrow_mut().set(index, L1Entry::table(offset).0);
        self.metadata.borrow_mut().insert(allocation.first, 1);
        self.progress.changed(true);
        if let Some(shared) = before {
            self.unmap(Mapping::Data(shared), 1, false);
        }
        Ok(())
    }

    fn owns_l2_table(&self, index: usize) -> bool {
        let entry = L1Entry(self.l1.borrow().entry(index));
        entry.offset().is_some() && entry.is_copied()
    }

    /// The table has no dirty slices: one that is not owned is never changed.
    async fn copy_cluster(&self, from: HostOffset, to: HostOffset) -> Result<()> {
        let length = self.geometry.cluster_size() as usize;
        self.tell(DebugEvent::L2AllocCowRead);
        let bytes = self.read_metadata(from, length).await?;
        self.tell(DebugEvent::L2AllocWrite);
        self.write_metadata(to, &bytes).await
    }
}

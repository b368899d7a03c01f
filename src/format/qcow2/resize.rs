//! Another size of the virtual disk.

use crate::block::DebugEvent;
use crate::error::{Error, ErrorKind, Result};
use crate::range::{ByteRange, align_down, align_up};

use super::Qcow2;
use super::layout::{GuestOffset, L1Entry, MAX_L1_BYTES, Mapping};
use super::table::{self, Table};
use super::zero::Fate;

impl Qcow2 {
    /// Sets the size; durable when answered. New bytes read as zeroes: a longer backing file does not
    /// show, nor does what a shorter disk left in its last cluster.
    pub(super) async fn resize(&self, size: u64) -> Result<()> {
        self.check_bitmaps_for_resize()?;
        self.check_snapshots_for_resize()?;
        self.prepare_write().await?;
        if !size.is_multiple_of(512) {
            let message = "The new size must be a multiple of 512";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let before = self.size.get();
        if size < before {
            self.shrink(size, before).await?;
        } else if size > before {
            self.grow(size, before).await?;
        }
        Box::pin(self.resize_bitmaps(size, before)).await;
        Ok(())
    }

    /// Whoever goes back to a snapshot must find the size that its disk had.
    fn check_snapshots_for_resize(&self) -> Result<()> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
        let snapshots = self.snapshots.borrow();
        if !snapshots.is_empty() && self.version < 3 {
            return refuse("Can't resize a v2 image which has snapshots");
        }
        if snapshots
            .iter()
            .any(|snapshot| snapshot.disk_size.is_none())
        {
            return refuse("Can't resize an image with a snapshot that does not say its disk size");
        }
        Ok(())
    }

    async fn grow(&self, size: u64, before: u64) -> Result<()> {
        let entries = self.geometry.l1_entries_for(size);
        if size > i64::MAX as u64 || entries * 8 > MAX_L1_BYTES {
            let message = format!("Image is too big: {size:#x} bytes need {entries} L1 entries");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if entries as usize > self.l1.borrow().length() {
            self.grow_l1(entries).await?;
        }
        self.zero_new(before, size).await?;
        self.flush_all().await?;
        self.update_header(|header| header.size = size).await?;
        self.size.set(size);
        Ok(())
    }

    /// Makes what comes to light read as zeroes, before it does.
    async fn zero_new(&self, before: u64, size: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let end = align_up(before, cluster_size).unwrap_or(before);
        if before < end {
            let part = ByteRange::between(before, end);
            self.zero_part(part).await?;
        }
        // What a shrink that did not come to its end has left there.
        let rest = align_up(size, cluster_size).unwrap_or(size);
        if end < rest {
            self.set_fate(ByteRange::between(end, rest), Fate::Unallocated)
                .await?;
        }
        let shown = self.backing().map_or(0, |backing| backing.node().size());
        if shown.min(size) <= end {
            return Ok(());
        }
        let whole = ByteRange::between(end, shown.min(size)).align_outward(cluster_size);
        if self.version >= 3 {
            return self.set_fate(whole, Fate::Zero).await;
        }
        let piece = cluster_size.max(1 << 20);
        let mut start = whole.start();
        while start < whole.end() {
            let next = whole.end().min(start + piece);
            self.zero_part(ByteRange::between(start, next)).await?;
            start = next;
        }
        Ok(())
    }

    /// A longer L1 table in another place.
    async fn grow_l1(&self, entries: u64) -> Result<()> {
        let _turn = self.tables.take().await;
        self.write_back(true).await?;
        let bytes = entries * 8;
        let clusters = self.geometry.clusters_for(bytes).0;
        self.tell(DebugEvent::L1GrowAllocTable);
        let allocation = self.allocate_contiguous(clusters).await?;
        let offset = self.geometry.host_offset(allocation.first);
        let mut longer = self.l1.borrow().entries().to_vec();
        longer.resize(entries as usize, 0);
        let mut on_disk = table::serialise(&longer);
        on_disk.resize((clusters * self.geometry.cluster_size()) as usize, 0);
        self.tell(DebugEvent::L1GrowWriteTable);
        let mut result = self.write_metadata(offset, &on_disk).await;
        if result.is_ok() {
            // The refcounts of the new table, and the table.
            result = self.write_back(true).await;
        }
        if let Err(error) = result {
            self.release(allocation).await;
            return Err(error);
        }
        let (before, bytes_before) = {
            let header = self.header.borrow();
            (header.l1_offset, u64::from(header.l1_entries) * 8)
        };
        self.tell(DebugEvent::L1GrowActivateTable);
        self.update_header(|header| {
            header.l1_offset = offset;
            header.l1_entries = entries as u32;
        })
        .await?;
        self.l1.replace(Table::new(longer));
        self.metadata
            .borrow_mut()
            .insert(allocation.first, clusters);
        if bytes_before > 0 {
            self.forget_metadata(before, bytes_before);
        }
        Ok(())
    }

    /// Once the header has the new size the disk has it, whatever becomes of what was cut off: a caller
    /// who was told of a failure would go on with the old size.
    async fn shrink(&self, size: u64, before: u64) -> Result<()> {
        self.flush_all().await?;
        self.update_header(|header| header.size = size).await?;
        self.size.set(size);
        if let Err(error) = self.free_cut_off(size, before).await {
            tracing::warn!(node = self.node_name, size, %error, "space behind the new end is not freed yet");
        }
        Ok(())
    }

    async fn free_cut_off(&self, size: u64, before: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let start = align_up(size, cluster_size).unwrap_or(size);
        let end = align_up(before, cluster_size).unwrap_or(before);
        if start < end {
            self.set_fate(ByteRange::between(start, end), Fate::Unallocated)
                .await?;
            self.drop_l2_tables(start).await;
        }
        self.flush_all().await
    }

    /// L2 tables that map only what lies from `start` on: all of it is unallocated.
    async fn drop_l2_tables(&self, start: u64) {
        let _turn = self.tables.take().await;
        let start = align_down(start, self.geometry.cluster_size());
        let first = self.geometry.guest_cluster(GuestOffset(start));
        for index in self.tables_after(first) {
            let entry = L1Entry(self.l1.borrow().entry(index));
            let Some(offset) = entry.offset() else {
                continue;
            };
            self.l1.borrow_mut().set(index, 0);
            let slices = self.geometry.l2_entries() >> self.l2_slice_bits();
            let key = index as u64 * slices;
            self.l2.forget(key..key + slices);
            self.progress.changed(false);
            self.unmap(Mapping::Data(offset), 1, true);
        }
    }
}

//! Keeping what is stored true while the image is written.
//!
//! A region of the disk is marked dirty in all stored bitmaps before the first write to it, which costs one
//! barrier, and nothing after that. When many are marked, what is stored is written anew with what is
//! really dirty, and the marks go.

use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags};
use crate::error::Result;
use crate::range::ByteRange;

use super::super::Qcow2;
use super::super::header_write::SECTOR;
use super::super::layout::HostOffset;
use super::directory::Part;
use super::store::{Purpose, table_bytes};

impl Qcow2 {
    /// Marks the regions of the range; durable when answered.
    pub(super) async fn mark_regions(&self, range: ByteRange) -> Result<()> {
        let _turn = self.bitmaps.turn.take().await;
        if self.bitmaps.bitmaps.is_kept(range) {
            return Ok(());
        }
        self.check_health()?;
        if self.header_unsure.get() {
            self.update_header(|_| {}).await?;
        }
        if !self.tables_fit() {
            self.store_in_turn(Purpose::InUse).await?;
        }
        let marked = self.bitmaps.bitmaps.with_kept(|kept| {
            let marked = kept.marked();
            (marked.granularity(), marked.dirty_bytes())
        });
        let Some((region, bytes)) = marked else {
            return Ok(());
        };
        if bytes / region >= self.bitmaps.keeping.most_marked {
            self.take_marks_back().await?;
        }
        let range = range.align_outward(region);
        self.write_marks(range).await?;
        self.bitmaps.bitmaps.set_kept(range);
        Ok(())
    }

    /// Tables are as long as the size of the disk wants.
    fn tables_fit(&self) -> bool {
        let directory = self.bitmaps.directory.borrow();
        let mut used = self.used_bitmaps().into_iter();
        used.all(|(index, bitmap)| {
            let length = self.bitmap_table_length(bitmap.granularity());
            directory.entries[index].table().len() as u64 == length
        })
    }

    /// Writes regions anew that no write is in flight to: what is stored of them is what is dirty, or was
    /// when a crash might have undone the change. Until then their marks are more than that.
    async fn take_marks_back(&self) -> Result<()> {
        let quiet = self.bitmaps.bitmaps.unmark_quiet();
        self.flush_all().await?;
        for (index, bitmap) in self.used_bitmaps() {
            let coverage = self.bitmap_coverage(bitmap.granularity());
            let mut last = None;
            for number in quiet.iter().flat_map(|range| windows(*range, coverage)) {
                if last.replace(number) == Some(number) {
                    continue;
                }
                if let Some(offset) = self.stored_part(index, number) {
                    let bytes = self.bits_for_disk(&bitmap, number, true, None);
                    self.write_metadata(offset, &bytes).await?;
                }
            }
        }
        Ok(())
    }

    fn stored_part(&self, index: usize, number: usize) -> Option<HostOffset> {
        let directory = self.bitmaps.directory.borrow();
        match directory.entries[index].table().get(number) {
            Some(Part::Stored(offset)) => Some(*offset),
            _ => None,
        }
    }

    async fn write_marks(&self, range: ByteRange) -> Result<()> {
        let size = self.size.get();
        let range = ByteRange::between(range.start().min(size), range.end().min(size));
        for (index, bitmap) in self.used_bitmaps() {
            if !bitmap.is(BitmapFlags::ENABLED) {
                continue;
            }
            for number in windows(range, self.bitmap_coverage(bitmap.granularity())) {
                self.write_mark(index, &bitmap, number, range).await?;
            }
        }
        if self.bitmaps.directory.borrow().unsure {
            self.write_tables_in_place().await?;
        }
        self.barrier().await
    }

    async fn write_mark(
        &self,
        index: usize,
        bitmap: &Rc<Bitmap>,
        number: usize,
        range: ByteRange,
    ) -> Result<()> {
        let bytes = self.bits_for_disk(bitmap, number, true, Some(range));
        if let Some(offset) = self.stored_part(index, number) {
            let span = self.span(bitmap, number, range);
            let offset = offset.plus(span.start as u64);
            return self.write_metadata(offset, &bytes[span]).await;
        }
        let allocation = self.allocate(1).await?;
        let offset = self.geometry.host_offset(allocation.first);
        if let Err(error) = self.write_metadata(offset, &bytes).await {
            self.release(allocation).await;
            return Err(error);
        }
        self.metadata.borrow_mut().insert(allocation.first, 1);
        let mut directory = self.bitmaps.directory.borrow_mut();
        directory.unsure = true;
        if let super::State::Used(table) = &mut directory.entries[index].state {
            table[number] = Part::Stored(offset);
        }
        Ok(())
    }

    /// Which bytes of a cluster of bits tell of the range: whole sectors.
    fn span(&self, bitmap: &Bitmap, number: usize, range: ByteRange) -> std::ops::Range<usize> {
        let coverage = self.bitmap_coverage(bitmap.granularity());
        let start = (number as u64).saturating_mul(coverage);
        let sector = bitmap.granularity().saturating_mul(SECTOR as u64 * 8);
        let first = range.start().saturating_sub(start) / sector;
        let last = (range.end() - 1 - start).min(coverage - 1) / sector;
        first as usize * SECTOR..(last as usize + 1) * SECTOR
    }

    /// Tables get the clusters that they have in memory, which are durable before.
    async fn write_tables_in_place(&self) -> Result<()> {
        self.flush_all().await?;
        let directory = self.bitmaps.directory.borrow().clone();
        for stored in &directory.entries {
            if !stored.table().is_empty() {
                let bytes = table_bytes(stored.table());
                self.write_metadata(stored.entry.table, &bytes).await?;
            }
        }
        self.barrier().await?;
        self.bitmaps.directory.borrow_mut().unsure = false;
        Ok(())
    }
}

/// The clusters of bits that tell of a range.
fn windows(range: ByteRange, coverage: u64) -> std::ops::Range<usize> {
    if range.is_empty() {
        return 0..0;
    }
    let (first, last) = (range.start() / coverage, (range.end() - 1) / coverage);
    first as usize..last as usize + 1
}

//! Making internal snapshots, deleting them, and going back to one.
//!
//! Each ends in one write of the header. What it names then, tables and refcounts, is durable before; what it
//! names no more is freed after. So a crash leaves the snapshots as before or as wanted, at worst with clusters
//! that are leaked and COPIED flags that are missing (`references`).
//!
//! The caller holds requests of the disk back.

use crate::error::{Error, ErrorKind, Result};

use super::Qcow2;
use super::allocator::Allocation;
use super::header::Header;
use super::layout::{HostOffset, MAX_L1_BYTES};
use super::metadata_set::MetadataSet;
use super::references::without_copied;
use super::snapshot_table::{self, InternalSnapshot, read_snapshots};
use super::table::{self, Table};

/// What is given back when a change fails before its header is written.
#[derive(Default)]
struct Draft {
    taken: Vec<Allocation>,
    /// The L1 table whose references were counted, and how many of them.
    l1: Vec<u64>,
    added: u64,
}

impl Qcow2 {
    /// The internal snapshots, in the order of their table. None of an image that is open read-only and has a
    /// malformed table.
    pub fn snapshots(&self) -> Vec<InternalSnapshot> {
        self.snapshots.borrow().clone()
    }

    /// Reads the table of snapshots.
    ///
    /// # Errors
    /// It is malformed, or the file cannot be read.
    pub(super) async fn load_snapshots(&self) -> Result<()> {
        self.snapshots.take();
        let header = self.header.borrow().clone();
        let snapshots = read_snapshots(&self.file(), &header).await?;
        self.snapshots.replace(snapshots);
        Ok(())
    }

    /// Makes a snapshot of the disk as it is; durable when answered. `date`: seconds since 1970, and
    /// nanoseconds.
    ///
    /// # Errors
    /// The name is no good or taken, refcounts are too small to count another user, no space, what the file
    /// says: the image has the snapshots that it had.
    pub async fn create_snapshot(&self, name: &str, date: (u32, u32)) -> Result<()> {
        self.prepare_write().await?;
        let mut all = self.snapshots();
        let id = snapshot_table::new_id(&all);
        let new = InternalSnapshot::new(name, id, date, self.size.get())?;
        if all.iter().any(|snapshot| snapshot.name == name) {
            let message = format!("Snapshot with name '{name}' already exists");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let before = (
            self.header.borrow().snapshots_offset,
            snapshot_table::bytes_of(&all),
        );
        let _tables = self.tables.take().await;
        self.flush_all().await?;
        self.allocator.tail.set(None);
        let l1 = without_copied(self.l1.borrow().entries());
        all.push(new);
        let mut draft = Draft {
            l1,
            ..Draft::default()
        };
        let result = self.draft_snapshot(&mut draft, &mut all).await;
        let offset = self.or_take_back(&mut draft, result).await?;
        self.write_snapshot_header(&mut draft, offset, all).await?;
        self.forget_place(before);
        Ok(())
    }

    /// All that the header is to name, durably.
    async fn draft_snapshot(
        &self,
        draft: &mut Draft,
        all: &mut [InternalSnapshot],
    ) -> Result<HostOffset> {
        let entries = draft.l1.len() as u32;
        let l1 = table::serialise(&draft.l1);
        let copy = self.write_new_table(draft, &l1).await?;
        if let Some(new) = all.last_mut() {
            new.place_l1(copy, entries);
        }
        let offset = self
            .write_new_table(draft, &snapshot_table::serialise(all)?)
            .await?;
        self.replace_l1(draft.l1.clone()).await?;
        self.share(draft).await?;
        Ok(offset)
    }

    /// What the draft's L1 table refers to gets another user, durably.
    async fn share(&self, draft: &mut Draft) -> Result<()> {
        self.clear_copied(&draft.l1).await?;
        self.barrier().await?;
        self.add_references(&draft.l1, &mut draft.added).await?;
        self.write_back(true).await
    }

    /// Deletes a snapshot, by its place in the table, which must be there; durable when answered.
    ///
    /// # Errors
    /// What the file says: the snapshot is there. When the header no longer names it, it is deleted, also if its
    /// space cannot be freed (that is logged, and leaks).
    pub async fn delete_snapshot(&self, number: usize) -> Result<()> {
        self.prepare_write().await?;
        let mut all = self.snapshots();
        let before = (
            self.header.borrow().snapshots_offset,
            snapshot_table::bytes_of(&all),
        );
        let gone = all.remove(number);
        let _tables = self.tables.take().await;
        self.flush_all().await?;
        let gone_l1 = self.read_snapshot_l1(&gone).await?;
        let mut draft = Draft::default();
        let result = self.draft_table(&mut draft, &all).await;
        let offset = self.or_take_back(&mut draft, result).await?;
        self.write_snapshot_header(&mut draft, offset, all).await?;
        self.forget_place(before);
        self.forget_place(gone.l1_place());
        self.drop_references(&gone_l1, u64::MAX).await;
        self.settle_flags().await;
        Ok(())
    }

    async fn draft_table(&self, draft: &mut Draft, all: &[InternalSnapshot]) -> Result<HostOffset> {
        let offset = self
            .write_new_table(draft, &snapshot_table::serialise(all)?)
            .await?;
        self.write_back(true).await?;
        Ok(offset)
    }

    /// Gives the disk the content and the size that it had when a snapshot was made, by its place in the table,
    /// which must be there; durable when answered. All snapshots stay.
    ///
    /// # Errors
    /// There are bitmaps, which would not know of it; the snapshot's disk is larger than can be; what the file says:
    /// the disk has its content.
    pub async fn apply_snapshot(&self, number: usize) -> Result<()> {
        if !self.bitmap_infos().is_empty() {
            let message = "Device has active dirty bitmaps";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        self.prepare_write().await?;
        let all = self.snapshots();
        let _tables = self.tables.take().await;
        self.flush_all().await?;
        let size = all[number].disk_size.unwrap_or(self.size.get());
        let mut l1 = without_copied(&self.read_snapshot_l1(&all[number]).await?);
        let entries = self.geometry.l1_entries_for(size).max(l1.len() as u64);
        if size > i64::MAX as u64 || !size.is_multiple_of(512) || entries * 8 > MAX_L1_BYTES {
            let message =
                format!("The snapshot's disk has {size:#x} bytes, which no disk can have");
            return Err(Error::new(ErrorKind::InvalidImage, message));
        }
        l1.resize(entries as usize, 0);
        let before_l1 = self.l1.borrow().entries().to_vec();
        let before = self.l1_place();
        let mut draft = Draft {
            l1,
            ..Draft::default()
        };
        let result = self.draft_l1(&mut draft, size).await;
        let (after, metadata) = self.or_take_back(&mut draft, result).await?;
        let written = self.update_header(|header| {
            header.l1_offset = after.l1_offset;
            header.l1_entries = after.l1_entries;
            header.size = after.size;
        });
        let written = written.await;
        self.or_take_back_header(&mut draft, written).await?;
        self.l2.forget(0..u64::MAX);
        self.l1.replace(Table::new(std::mem::take(&mut draft.l1)));
        self.size.set(size);
        self.decompressed.take();
        self.metadata.replace(metadata);
        self.forget_place(before);
        self.drop_references(&before_l1, u64::MAX).await;
        self.settle_flags().await;
        Ok(())
    }

    /// The header to be, and where metadata lies then.
    async fn draft_l1(&self, draft: &mut Draft, size: u64) -> Result<(Header, MetadataSet)> {
        let l1 = table::serialise(&draft.l1);
        let mut after = self.header.borrow().clone();
        after.l1_offset = self.write_new_table(draft, &l1).await?;
        (after.l1_entries, after.size) = (draft.l1.len() as u32, size);
        self.share(draft).await?;
        let metadata = self.metadata_of(&after, &Table::new(draft.l1.clone()))?;
        Ok((after, metadata))
    }

    async fn read_snapshot_l1(&self, snapshot: &InternalSnapshot) -> Result<Vec<u64>> {
        let (offset, bytes) = snapshot.l1_place();
        let bytes = self.read_metadata(offset, bytes as usize).await?;
        Ok(Table::parse(&bytes).entries().to_vec())
    }

    fn l1_place(&self) -> (HostOffset, u64) {
        let header = self.header.borrow();
        (header.l1_offset, u64::from(header.l1_entries) * 8)
    }

    /// Writes a table to clusters of its own; to none where it is empty.
    async fn write_new_table(&self, draft: &mut Draft, bytes: &[u8]) -> Result<HostOffset> {
        match bytes.is_empty() {
            true => Ok(HostOffset(0)),
            false => self.write_new_metadata(&mut draft.taken, bytes).await,
        }
    }

    async fn write_snapshot_header(
        &self,
        draft: &mut Draft,
        offset: HostOffset,
        all: Vec<InternalSnapshot>,
    ) -> Result<()> {
        let written = self.update_header(|header| {
            header.snapshots_offset = offset;
            header.snapshots = all.len() as u32;
        });
        let written = written.await;
        self.or_take_back_header(draft, written).await?;
        self.snapshots.replace(all);
        self.adopt_places(draft);
        Ok(())
    }

    /// What was drafted, or the error, after the draft was taken back.
    async fn or_take_back<T>(&self, draft: &mut Draft, drafted: Result<T>) -> Result<T> {
        if drafted.is_err() {
            self.take_back(draft).await;
        }
        drafted
    }

    /// After a failed write the disk may have the new header. Nothing is taken back before it has the old one
    /// again: what the draft took is leaked where that fails, too.
    async fn or_take_back_header(&self, draft: &mut Draft, written: Result<()>) -> Result<()> {
        if let Err(error) = written {
            if self.update_header(|_| {}).await.is_ok() {
                self.take_back(draft).await;
            }
            return Err(error);
        }
        Ok(())
    }

    async fn take_back(&self, draft: &mut Draft) {
        let Draft { l1, added, .. } = draft;
        let rose = std::mem::take(added);
        if rose > 0 {
            self.drop_references(l1, rose).await;
        }
        for allocation in draft.taken.drain(..) {
            self.release(allocation).await;
        }
        self.settle_flags().await;
    }

    /// Refcounts have fallen: what is no longer shared may be changed in place again, from when that is durable.
    /// Where it fails, writes make copies that they need not make.
    async fn settle_flags(&self) {
        let mut settled = self.write_back(true).await;
        if settled.is_ok() {
            settled = self.restore_copied().await;
        }
        if settled.is_ok() {
            settled = self.barrier().await;
        }
        if let Err(error) = settled {
            tracing::warn!(node = self.node_name, %error, "clusters that are not shared count as shared");
        }
        self.reclaim_quiet().await;
    }

    fn adopt_places(&self, draft: &Draft) {
        for Allocation { first, count, .. } in &draft.taken {
            self.metadata.borrow_mut().insert(*first, *count);
        }
    }

    fn forget_place(&self, (offset, bytes): (HostOffset, u64)) {
        if bytes > 0 {
            self.forget_metadata(offset, bytes);
        }
    }
}

//! Metadata to disk, in an order in which a crash at any moment costs at most leaked clusters.
//!
//! 1. Refcount blocks that changed. Refcounts rise before a mapping and fall after its end is
//!    durable, so they may be written at any time.
//! 2. Where there are new refcount blocks: barrier, then the refcount table.
//! 3. Barrier, if something of 1 or 2 was written or a mapping relies on new data.
//! 4. L2 and L1 tables as they were when the write-back began.
//! 5. For a flush: barrier; what lost its mapping before the write-back began may become free.

use std::cell::{Cell, RefCell};

use crate::block::{DebugEvent, WriteFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, Result};

use super::Qcow2;
use super::epochs::Freed;
use super::join::{Piece, join_some};
use super::layout::HostOffset;
use super::table::Table;
use super::turn::Turn;

/// Metadata writes in flight at a time.
const MOST_WRITES: usize = 64;

/// How far the disk is behind the mappings in memory. Numbers count changes.
#[derive(Default)]
pub(super) struct Progress {
    turn: Turn,
    changes: Cell<u64>,
    durable: Cell<u64>,
    /// The last change that relies on clusters that were written before.
    reliant: Cell<u64>,
    /// Changes up to this one rely on nothing that is not durable.
    ordered: Cell<u64>,
}

impl Progress {
    /// A mapping changed. `reliant`: it relies on new clusters.
    pub(super) fn changed(&self, reliant: bool) {
        let number = self.changes.get() + 1;
        self.changes.set(number);
        if reliant {
            self.reliant.set(number);
        }
    }

    /// All mappings are on disk for good.
    pub(super) fn is_durable(&self) -> bool {
        self.durable.get() == self.changes.get()
    }
}

/// Mappings as they were at one moment.
struct Snapshot {
    changes: u64,
    reliant: bool,
    l2: Vec<(u64, MemorySlice)>,
    l1: Vec<(usize, MemorySlice)>,
    unmapped: Vec<Freed>,
}

impl Snapshot {
    fn is_empty(&self) -> bool {
        self.l2.is_empty() && self.l1.is_empty()
    }
}

impl Qcow2 {
    /// Writes out what is dirty and makes everything durable.
    pub(super) async fn flush_all(&self) -> Result<()> {
        if self.is_clean() {
            return self.file().flush().await;
        }
        self.check_health()?;
        self.write_back(true).await?;
        self.reclaim_quiet().await;
        Ok(())
    }

    /// Frees what nobody can reach any more. That waited for transfers, which may have ended long
    /// after the flush that made it unreachable on disk.
    pub(super) async fn reclaim_quiet(&self) {
        if self.epochs.has_quiet() {
            let _turn = self.allocator.turn.take().await;
            self.reclaim().await;
        }
    }

    /// Nothing is to be written out, and all mappings are durable.
    pub(super) fn is_clean(&self) -> bool {
        self.progress.is_durable()
            && !self.header_unsure.get()
            && self.epochs.unmapped() == 0
            && !self.refcounts.is_dirty()
            && !self.refcount_table.borrow().is_dirty()
    }

    /// Writes out what is dirty; `durable`: it and all data are durable afterwards.
    pub(super) async fn write_back(&self, durable: bool) -> Result<()> {
        let _turn = self.progress.turn.take().await;
        if self.header_unsure.get() {
            self.update_header(|_| {}).await?;
        }
        let snapshot = self.snapshot();
        let mut result = self.write_in_order(&snapshot).await;
        if durable && result.is_ok() {
            result = self.barrier().await;
        }
        if durable && result.is_ok() {
            self.progress.durable.set(snapshot.changes);
            self.epochs.seal(snapshot.unmapped);
        } else {
            self.epochs.put_back(snapshot.unmapped);
        }
        result
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            changes: self.progress.changes.get(),
            reliant: self.progress.reliant.get() > self.progress.ordered.get(),
            l2: self.l2.take_dirty(),
            l1: self.l1.borrow_mut().take_dirty(),
            unmapped: self.epochs.take_unmapped(),
        }
    }

    async fn write_in_order(&self, snapshot: &Snapshot) -> Result<()> {
        let mut result = self.write_refcounts().await;
        if let Ok(wrote) = result
            && !snapshot.is_empty()
            && (wrote || snapshot.reliant)
        {
            result = self.barrier().await.map(|()| true);
        }
        if result.is_ok() {
            self.progress.ordered.set(snapshot.changes);
        }
        self.write_mappings(snapshot, result.map(|_| ())).await
    }

    /// Steps 1 and 2. Answers whether anything was written.
    async fn write_refcounts(&self) -> Result<bool> {
        let groups = self.refcount_table.borrow_mut().take_dirty();
        let slices = self.refcounts.take_dirty();
        let wrote = !groups.is_empty() || !slices.is_empty();
        let blocks = slices.iter().map(|(key, bytes)| {
            Box::pin(async move {
                let result = match self.refcount_slice_offset(*key) {
                    Some(offset) => {
                        let event = DebugEvent::RefblockUpdatePart;
                        self.write_slice(event, offset, bytes).await
                    }
                    None => unreachable!("a refcount slice without a block"),
                };
                self.refcounts.written(*key, result.is_ok());
                result
            }) as Piece<'_>
        });
        let mut result = join_some(blocks, MOST_WRITES).await;
        if result.is_ok() && !groups.is_empty() {
            result = self.barrier().await;
        }
        let start = self.header.borrow().refcount_table_offset;
        let part = (&self.refcount_table, start, DebugEvent::ReftableUpdate);
        self.write_table(part, &groups, result).await?;
        Ok(wrote)
    }

    /// Step 4, or after a failure: all of it is dirty again.
    async fn write_mappings(&self, snapshot: &Snapshot, before: Result<()>) -> Result<()> {
        let mut result = before;
        if result.is_ok() {
            let slices = snapshot.l2.iter().map(|(key, bytes)| {
                Box::pin(async move {
                    let result = match self.l2_slice_offset(*key) {
                        Some(offset) => {
                            let event = DebugEvent::L2Update;
                            self.write_slice(event, offset, bytes).await
                        }
                        None => Ok(()),
                    };
                    self.l2.written(*key, result.is_ok());
                    result
                }) as Piece<'_>
            });
            result = join_some(slices, MOST_WRITES).await;
        } else {
            for (key, _) in &snapshot.l2 {
                self.l2.written(*key, false);
            }
        }
        let start = self.header.borrow().l1_offset;
        let part = (&self.l1, start, DebugEvent::L1Update);
        self.write_table(part, &snapshot.l1, result).await
    }

    /// Writes groups of a table, if all went well before; else they are dirty again.
    async fn write_table(
        &self,
        (table, start, event): (&RefCell<Table>, HostOffset, DebugEvent),
        groups: &[(usize, MemorySlice)],
        before: Result<()>,
    ) -> Result<()> {
        let mut result = before;
        for (group, bytes) in groups {
            if result.is_ok() {
                let offset = start.plus(Table::group_offset(*group));
                result = self.write_slice(event, offset, bytes).await;
            }
            if result.is_err() {
                table.borrow_mut().put_back(*group);
            }
        }
        result
    }

    async fn write_slice(
        &self,
        event: DebugEvent,
        offset: HostOffset,
        bytes: &MemorySlice,
    ) -> Result<()> {
        self.tell(event);
        let payload = Payload::from(bytes.clone());
        self.file()
            .write(offset.0, payload, WriteFlags::empty())
            .await
    }

    /// Everything that was written before is durable afterwards. Where it fails, nothing is written
    /// that relies on it; a later one may succeed, if the file does not know that data is lost.
    pub(super) async fn barrier(&self) -> Result<()> {
        let result = self.file().flush().await;
        result.map_err(|error| error.context("Could not flush the image file"))
    }

    /// `EIO` once metadata turned out to be wrong.
    pub(super) fn check_health(&self) -> Result<()> {
        match self.health.borrow().failure() {
            None => Ok(()),
            Some(reason) => {
                let message = format!("Node '{}' is read-only now: {reason}", self.node_name);
                Err(Error::from_errno(nix::errno::Errno::EIO, message))
            }
        }
    }
}

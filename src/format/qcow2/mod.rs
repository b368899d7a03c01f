//! The qcow2 format, versions 2 and 3.
//!
//! A guest offset leads through the L1 table and an L2 table to a host cluster; refcounts say which
//! host clusters are in use. L1 and refcount table are in memory, slices of the others in caches.
//! Images with internal snapshots are written like others: what snapshots use, too, has no COPIED flag and
//! is copied before it changes. Not here: opening children (that is `blockdev`'s), subclusters, external data
//! files, encryption.
//!
//! Invariants:
//! - A mapping reaches the disk after the data and the refcounts that it needs are durable
//!   (`write_back`); a cluster gets a mapping in memory after its data was written.
//! - A host cluster that lost its mapping is used again only when the disk has no mapping to it and no
//!   transfer that saw the mapping is in flight (`epochs`).
//! - Whoever changes the mapping of a guest cluster holds its lock; locks are taken in the order
//!   bitmaps, guest clusters, L2 tables, allocation, write-back, header.
//! - No `RefCell` borrow lives over an await.

mod allocator;
mod bitmaps;
pub mod check;
mod compress;
pub mod compressed;
mod corruption;
mod cow;
pub mod create;
mod driver;
mod entry;
mod epochs;
pub mod extension;
pub mod header;
mod header_check;
mod header_update;
pub mod header_write;
mod info;
mod join;
pub mod layout;
mod lookup;
mod metadata_set;
mod open;
mod read;
mod rebuild;
mod refcount_table;
mod refcounts;
mod references;
mod resize;
mod slice_cache;
pub mod snapshot_table;
mod snapshots;
mod status;
mod table;
mod turn;
mod write;
mod write_back;
mod write_compressed;
mod zero;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{Child, DebugEvent, Graph, RangeLock};
use crate::runtime::Handle;

use allocator::Allocator;
use bitmaps::StoredBitmaps;
use corruption::Health;
use epochs::Epochs;
use header::Header;
use layout::Geometry;
use metadata_set::MetadataSet;
use slice_cache::SliceCache;
use snapshot_table::InternalSnapshot;
use table::Table;
use turn::Turn;
use write_back::Progress;

pub use bitmaps::{BitmapInfo, BitmapKeeping};
pub use info::Qcow2Info;
pub use open::{CacheSizes, OpenOptions};

/// An open qcow2 image.
pub struct Qcow2 {
    node_name: String,
    graph: Option<Graph>,
    file: RefCell<Rc<Child>>,
    backing: RefCell<Option<Rc<Child>>>,
    pass_discard: Cell<bool>,
    discard_no_unref: bool,

    version: u32,
    geometry: Geometry,
    header: RefCell<Header>,
    header_turn: Turn,
    /// The last change of the header failed: the disk may have the new one or the old one.
    header_unsure: Cell<bool>,
    size: Cell<u64>,
    /// The internal snapshots, as the header's table has them.
    snapshots: RefCell<Vec<InternalSnapshot>>,
    read_only: Cell<bool>,
    health: RefCell<Health>,
    /// Writes need no preparation: not read-only, healthy, autoclear bits cleared.
    writable: Cell<bool>,

    l1: RefCell<Table>,
    l2: SliceCache,
    /// Held by who creates an L2 table or replaces the L1 table.
    tables: Turn,
    refcount_table: RefCell<Table>,
    refcounts: SliceCache,
    metadata: RefCell<MetadataSet>,
    allocator: Allocator,
    epochs: Epochs,
    /// Guest clusters whose mapping is about to change.
    clusters: RangeLock,
    progress: Progress,
    /// Threads that compress.
    helpers: Option<Handle>,
    decompressed: RefCell<read::Decompressed>,
    bitmaps: StoredBitmaps,
}

impl Qcow2 {
    fn file(&self) -> Rc<Child> {
        self.file.borrow().clone()
    }

    /// Tells the node of the file what comes next.
    fn tell(&self, event: DebugEvent) {
        self.file.borrow().debug_event(event);
    }

    /// Whether freed clusters are discarded in the file (`pass-discard-request`), from now on.
    pub fn set_pass_discard(&self, pass: bool) {
        self.pass_discard.set(pass);
    }

    fn backing(&self) -> Option<Rc<Child>> {
        self.backing.borrow().clone()
    }
}

#[cfg(test)]
mod behaviour_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod qemu_tests;
#[cfg(test)]
mod snapshot_change_tests;
#[cfg(test)]
mod snapshot_tests;
#[cfg(test)]
mod tests;

//! Persistent dirty bitmaps: the bitmaps extension.
//!
//! A bitmap has an entry in the directory and a table of the clusters with its bits. While the image is
//! open for writing its entry is marked in use, so that other programs take it as inconsistent after a
//! crash. Here it is not: what the clusters say is kept true (`keep`), and an autoclear bit of our own, which
//! other writers clear, says so.
//!
//! Invariants:
//! - Under [`Autoclear::BITMAPS_KEPT`] the stored bits of every entry of ours have at least what has
//!   changed since the bitmap was clear: a region of the disk is marked in all of them, durably, before it is
//!   written.
//! - The directory and tables change by a new directory in new clusters, which the header names in one
//!   write; only bits, and table entries that get their first cluster, are written in place.
//! - Entries that are not understood here are kept as they are, but for the mark of being in use.

mod directory;
mod keep;
mod load;
mod store;

use std::cell::RefCell;
use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags, BitmapStore, Bitmaps, IoFuture};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::Qcow2;
use super::turn::Turn;

use directory::{Entry, GRANULARITY_BITS, MAX_BITMAPS, MAX_NAME, Part, Place};

use directory::EntryFlags;

pub(super) use store::Purpose;

/// Most entries of a bitmap table, as in QEMU.
const MAX_TABLE: u64 = 0x800_0000;
/// Most bytes of a bitmap, as in QEMU.
const MAX_BYTES: u64 = 0x2000_0000;

/// Bounds of the regions that are marked before they are written, and how many a disk has at most, where
/// the bounds allow it.
const LEAST_REGION: u64 = 1 << 20;
const MOST_REGION: u64 = 64 << 20;
const REGIONS: u64 = 4096;

/// What persistent bitmaps cost while the image is written: a region of the disk is marked in them before
/// it is first written. Larger regions are marked more seldom, and make more dirty that is not in a crash.
#[derive(Clone, Copy, Debug)]
pub struct BitmapKeeping {
    /// Bytes of a region, a power of two; by the size of the disk where it is not given.
    pub region: Option<u64>,
    /// When so many regions are marked, those that are not being written lose their marks.
    pub most_marked: u64,
}

impl BitmapKeeping {
    /// Bytes of a region of a disk of `size` bytes.
    pub(in crate::format) fn region_of(&self, size: u64) -> u64 {
        let by_size = (size / REGIONS).next_power_of_two();
        self.region
            .unwrap_or(by_size.clamp(LEAST_REGION, MOST_REGION))
    }
}

impl Default for BitmapKeeping {
    fn default() -> BitmapKeeping {
        BitmapKeeping {
            region: None,
            most_marked: 256,
        }
    }
}

/// The bitmaps of an image, in memory and as they are stored.
pub(super) struct StoredBitmaps {
    keeping: BitmapKeeping,
    bitmaps: Rc<Bitmaps>,
    /// Held by who changes what is stored.
    turn: Turn,
    directory: RefCell<Directory>,
}

impl StoredBitmaps {
    pub(super) fn new(keeping: BitmapKeeping) -> StoredBitmaps {
        StoredBitmaps {
            keeping,
            bitmaps: Rc::default(),
            turn: Turn::default(),
            directory: RefCell::default(),
        }
    }
}

/// What the image has.
#[derive(Clone, Debug, Default)]
struct Directory {
    place: Option<Place>,
    entries: Vec<StoredBitmap>,
    /// Tables on disk may lack clusters that they have here.
    unsure: bool,
}

/// A bitmap that the image has.
#[derive(Clone, Debug)]
struct StoredBitmap {
    entry: Entry,
    state: State,
    /// It came since the image was opened.
    is_new: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Not understood here.
    Foreign,
    /// It has a bitmap in memory, but its table was not read.
    Inconsistent,
    /// Its table.
    Used(Vec<Part>),
}

impl StoredBitmap {
    /// The name of its bitmap in memory.
    fn name(&self) -> Option<&str> {
        match self.state {
            State::Foreign => None,
            State::Inconsistent | State::Used(_) => self.entry.usable_name(),
        }
    }

    fn table(&self) -> &[Part] {
        match &self.state {
            State::Used(table) => table,
            State::Foreign | State::Inconsistent => &[],
        }
    }

    fn granularity(&self) -> u64 {
        1 << self.entry.granularity_bits
    }
}

/// A bitmap as queries show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Marked as in use.
    pub in_use: bool,
    /// Records from the opening on.
    pub auto: bool,
}

impl Qcow2 {
    /// The bitmaps in the image; those that came since it was opened are in it for good only when it is
    /// closed, as users of QEMU know it.
    pub(super) fn bitmap_infos(&self) -> Vec<BitmapInfo> {
        let directory = self.bitmaps.directory.borrow();
        let shown = directory.entries.iter().filter(|stored| !stored.is_new);
        shown
            .filter_map(|stored| {
                Some(BitmapInfo {
                    name: stored.name()?.to_owned(),
                    granularity: stored.granularity(),
                    in_use: stored.entry.flags.contains(EntryFlags::IN_USE),
                    auto: stored.entry.flags.contains(EntryFlags::AUTO),
                })
            })
            .collect()
    }

    /// The bitmaps that are stored and used, with their place in the directory.
    fn used_bitmaps(&self) -> Vec<(usize, Rc<Bitmap>)> {
        let directory = self.bitmaps.directory.borrow();
        let entries = directory.entries.iter().enumerate();
        entries
            .filter(|(_, stored)| matches!(stored.state, State::Used(_)))
            .filter_map(|(index, stored)| {
                let bitmap = self.bitmaps.bitmaps.find(stored.name()?)?;
                Some((index, bitmap))
            })
            .collect()
    }

    /// Bytes of a bitmap of this granularity.
    fn bitmap_bytes(&self, granularity: u64) -> u64 {
        self.size.get().div_ceil(granularity).div_ceil(8)
    }

    /// Entries of its table; one at least.
    fn bitmap_table_length(&self, granularity: u64) -> u64 {
        let bytes = self.bitmap_bytes(granularity).max(1);
        self.geometry.clusters_for(bytes).0
    }

    /// Bytes of the disk that a cluster of bits stands for.
    fn bitmap_coverage(&self, granularity: u64) -> u64 {
        granularity.saturating_mul(self.geometry.cluster_size() * 8)
    }

    /// Persistent bitmaps may go the way that another size of the disk wants.
    pub(super) fn check_bitmaps_for_resize(&self) -> Result<()> {
        let directory = self.bitmaps.directory.borrow();
        for stored in &directory.entries {
            let bitmap = stored
                .name()
                .and_then(|name| self.bitmaps.bitmaps.find(name));
            if let Some(bitmap) = bitmap {
                bitmap.check_not(BitmapFlags::all())?;
            }
        }
        Ok(())
    }

    /// The disk has another size. What is stored may follow late: what a table does not tell of is dirty.
    pub(super) async fn resize_bitmaps(&self, size: u64, before: u64) {
        self.bitmaps.bitmaps.resize(size);
        if size == before {
            return;
        }
        if let Err(error) = self.store_bitmaps(Purpose::InUse).await {
            tracing::warn!(node = self.node_name, size, %error, "bitmaps are stored for another size");
        }
    }

    /// All is stored for a writer who is not here; what is not stored will be lost.
    pub(super) async fn close_bitmaps(&self) -> Result<()> {
        if !self.read_only.get() {
            return self.store_bitmaps(Purpose::Closing).await;
        }
        let directory = self.bitmaps.directory.borrow();
        let is_stored = |bitmap: &Rc<Bitmap>| {
            let mut entries = directory.entries.iter();
            entries.any(|stored| stored.name() == Some(bitmap.name()))
        };
        if !self.persistent_bitmaps().iter().all(is_stored) {
            let node = &self.node_name;
            tracing::error!(
                "Lost persistent bitmaps during inactivation of node '{node}': No write access"
            );
        }
        Ok(())
    }

    /// The persistent bitmaps that are stored, or to be stored, with their names in the order in which they
    /// came.
    fn persistent_bitmaps(&self) -> Vec<Rc<Bitmap>> {
        let mut all = self.bitmaps.bitmaps.all();
        all.retain(|bitmap| bitmap.is(BitmapFlags::PERSISTENT) && !bitmap.is(BitmapFlags::LEAVING));
        all
    }
}

impl BitmapStore for Qcow2 {
    fn bitmaps(&self) -> &Rc<Bitmaps> {
        &self.bitmaps.bitmaps
    }

    fn check_new(&self, name: &str, granularity: u64) -> Result<()> {
        let refuse = |reason: &str| {
            let node = &self.node_name;
            let message = format!("Can't make bitmap '{name}' persistent in '{node}': {reason}");
            Err(Error::new(ErrorKind::InvalidArgument, message))
        };
        if self.version < 3 {
            return refuse("Cannot store dirty bitmaps in qcow2 v2 files");
        }
        if granularity.trailing_zeros() > u32::from(*GRANULARITY_BITS.end()) {
            return refuse("Granularity exceeds maximum (2147483648 bytes)");
        }
        let length = self.bitmap_table_length(granularity);
        let bytes = self.bitmap_bytes(granularity);
        if length > MAX_TABLE || bytes > MAX_BYTES {
            return refuse("Too much space will be occupied by the bitmap. Use larger granularity");
        }
        if name.len() > MAX_NAME {
            return refuse("Name length exceeds maximum (1023 characters)");
        }
        let mut entries: Vec<Entry> = {
            let directory = self.bitmaps.directory.borrow();
            let entries = directory.entries.iter();
            entries.map(|stored| stored.entry.clone()).collect()
        };
        if entries.len() >= MAX_BITMAPS {
            return refuse("Maximum number of persistent bitmaps is already reached");
        }
        entries.push(Entry::new(name, granularity));
        if directory::is_too_long(directory::serialise(entries.iter()).len()) {
            return refuse("Not enough space in the bitmap directory");
        }
        Ok(())
    }

    fn update(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            if self.read_only.get() {
                return Ok(());
            }
            self.store_bitmaps(store::Purpose::InUse).await
        })
    }

    fn mark(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(self.mark_regions(range))
    }
}

//! Persistent dirty bitmaps of raw images: in a file beside the image, on a [`Shelf`].
//!
//! The file is written anew as a whole, and takes the place of the one before in one step; only marks are written
//! in place. While the image is open for writing the file says so, and what it says is what has changed, or more:
//! before a region of the disk is first written it is marked there, durably.
//!
//! Invariants:
//! - Nothing is written in place of a file that a crash might exchange for another one: after a step that failed
//!   the whole file is written anew first.
//! - Bits go from what is stored only after the changes they stand for are durable in the image: a crash may also
//!   undo what a backup has seen.
//! - After a clean end the bits hold only for an image that nobody has changed since; after a crash only for the
//!   same image, not shorter. What else somebody does to it between a crash and the next opening is not noticed.

mod load;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{
    Bitmap, BitmapFlags, BitmapStore, Bitmaps, Child, DirtyBitmap, IoFuture, Shelf,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::BitmapKeeping;
use crate::range::ByteRange;
use crate::runtime::sync::Mutex;

use super::stored::{Entry, MOST_BITS, Slots, Stored};

/// What the bitmaps of a raw node are kept with.
pub struct BesideOptions {
    /// The node, for messages.
    pub node_name: String,
    /// Where they are kept.
    pub shelf: Rc<dyn Shelf>,
    /// What marks cost.
    pub keeping: BitmapKeeping,
    /// The node was opened read-only.
    pub read_only: bool,
}

/// The bitmaps of a raw node, in memory and as they are stored.
pub(super) struct Beside {
    node_name: String,
    shelf: Rc<dyn Shelf>,
    keeping: BitmapKeeping,
    read_only: Cell<bool>,
    bitmaps: Rc<Bitmaps>,
    /// Held by who changes what is stored.
    turn: Mutex<()>,
    locked: Cell<bool>,
    /// Where marks go; `None`: there is no file.
    slots: RefCell<Option<Slots>>,
    /// A step failed, or was not waited for.
    unsure: Cell<bool>,
    /// While the image is made shorter: its size then.
    least_size: Cell<u64>,
    given_up: Cell<bool>,
}

/// What bitmaps are stored for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The image is written.
    InUse,
    /// It is not written any more.
    Closing,
}

impl Beside {
    pub(super) fn new(options: BesideOptions) -> Beside {
        Beside {
            node_name: options.node_name,
            shelf: options.shelf,
            keeping: options.keeping,
            read_only: Cell::new(options.read_only),
            bitmaps: Rc::default(),
            turn: Mutex::new(()),
            locked: Cell::new(false),
            slots: RefCell::default(),
            unsure: Cell::new(false),
            least_size: Cell::new(u64::MAX),
            given_up: Cell::new(false),
        }
    }

    pub(super) fn bitmaps(&self) -> &Rc<Bitmaps> {
        &self.bitmaps
    }

    async fn hold_lock(&self) -> Result<()> {
        if !self.locked.get() {
            self.shelf.lock().await?;
            self.locked.set(true);
        }
        Ok(())
    }

    /// The image, which was not written, is about to be.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(super) async fn begin(&self, file: &Child, size: u64) -> Result<()> {
        if !self.read_only.replace(false) {
            return Ok(());
        }
        let begun = match self.look_again(size).await {
            Ok(()) => self.store(file, size, Purpose::InUse).await,
            Err(error) => Err(error),
        };
        if begun.is_err() {
            self.rest();
        }
        begun
    }

    /// The image is not written any more.
    ///
    /// # Errors
    /// What is stored says that it is in use, and has all that is dirty.
    pub(super) async fn end(&self, file: &Child, size: u64) -> Result<()> {
        if self.read_only.get() {
            if self.slots.borrow().is_none() && !self.persistent().is_empty() {
                let node = &self.node_name;
                tracing::error!(node, "persistent bitmaps are lost: the node is read-only");
            }
            return Ok(());
        }
        self.store(file, size, Purpose::Closing).await?;
        self.rest();
        Ok(())
    }

    /// Nothing is stored any more.
    fn rest(&self) {
        self.read_only.set(true);
        self.locked.set(false);
        self.shelf.unlock();
    }

    /// Stores bitmaps as they are; does nothing for an image that is not written.
    pub(super) async fn update(&self, file: &Child, size: u64) -> Result<()> {
        if self.read_only.get() {
            return Ok(());
        }
        self.store(file, size, Purpose::InUse).await
    }

    /// The image is about to get another size.
    ///
    /// # Errors
    /// A bitmap cannot follow.
    pub(super) async fn prepare_resize(&self, file: &Child, before: u64, size: u64) -> Result<()> {
        let all = self.persistent();
        for bitmap in &all {
            bitmap.check_not(BitmapFlags::all())?;
        }
        if all.is_empty() || size >= before {
            return Ok(());
        }
        self.least_size.set(size);
        let stored = self.store(file, before, Purpose::InUse).await;
        if stored.is_err() {
            self.least_size.set(u64::MAX);
        }
        stored
    }

    /// It has the size. What is stored may follow late: what it does not tell of is dirty.
    pub(super) async fn resized(&self, file: &Child, size: u64) {
        self.bitmaps.resize(size);
        self.least_size.set(u64::MAX);
        if let Err(error) = self.update(file, size).await {
            let node = &self.node_name;
            tracing::warn!(node, size, %error, "bitmaps are stored for another size");
        }
    }

    async fn store(&self, file: &Child, size: u64, purpose: Purpose) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.store_in_turn(file, size, purpose).await
    }

    async fn store_in_turn(&self, file: &Child, size: u64, purpose: Purpose) -> Result<()> {
        let all = self.persistent();
        if all.is_empty() && self.slots.borrow().is_none() {
            return Ok(());
        }
        // What a crash may undo is dirty, too, until it may not any more.
        file.flush().await?;
        let stored = match all.is_empty() {
            true => self.clear().await,
            false => self.put(self.picture(&all, size, purpose).await?).await,
        };
        let context = || format!("Could not store bitmaps in '{}'", self.shelf.name());
        stored.map_err(|error| error.context(context()))?;
        self.adopt(&all, size, purpose);
        Ok(())
    }

    async fn picture(&self, all: &[Rc<Bitmap>], size: u64, purpose: Purpose) -> Result<Stored> {
        self.hold_lock().await?;
        let in_use = purpose == Purpose::InUse;
        let stamp = match in_use {
            true => String::new(),
            false => self.shelf.stamp().await?,
        };
        let identity = self.shelf.identity().await?;
        // The bits come last: what changes after this is in regions that are marked.
        let entries = all.iter().map(|bitmap| self.entry(bitmap, size, in_use));
        Ok(Stored {
            identity,
            stamp,
            in_use,
            size,
            least_size: size.min(self.least_size.get()),
            entries: entries.collect(),
        })
    }

    /// What is dirty, and while the image is written all that may become so without another mark.
    fn entry(&self, bitmap: &Bitmap, size: u64, in_use: bool) -> Entry {
        let mut bits = DirtyBitmap::new(size, bitmap.granularity());
        let mut words = vec![0; bits.words().len()];
        bitmap.dirty_words(0, &mut words);
        if in_use {
            bitmap.withheld_words(0, &mut words);
        }
        bits.set_words(0, &words);
        let enabled = bitmap.is(BitmapFlags::ENABLED);
        if in_use && enabled {
            self.bitmaps.with_kept(|kept| bits.merge(kept.marked()));
        }
        Entry {
            name: bitmap.name().to_owned(),
            enabled,
            inconsistent: bitmap.is(BitmapFlags::INCONSISTENT),
            bits,
        }
    }

    /// The file is these bytes from now on, durably.
    async fn put(&self, stored: Stored) -> Result<()> {
        let (bytes, slots) = stored.encode()?;
        self.unsure.set(true);
        self.shelf.write_draft(bytes).await?;
        self.shelf.sync_draft().await?;
        self.shelf.put_draft().await?;
        self.shelf.sync_names().await?;
        *self.slots.borrow_mut() = Some(slots);
        self.unsure.set(false);
        Ok(())
    }

    async fn clear(&self) -> Result<()> {
        self.unsure.set(true);
        self.shelf.remove().await?;
        self.shelf.sync_names().await?;
        *self.slots.borrow_mut() = None;
        self.unsure.set(false);
        Ok(())
    }

    fn adopt(&self, all: &[Rc<Bitmap>], size: u64, purpose: Purpose) {
        let is_closing = purpose == Purpose::Closing;
        for bitmap in all {
            bitmap.set_flags(BitmapFlags::READ_ONLY, is_closing);
        }
        let is_usable = |bitmap: &Rc<Bitmap>| !bitmap.is(BitmapFlags::INCONSISTENT);
        if !is_closing && all.iter().any(is_usable) {
            self.bitmaps.keep(size, self.keeping.region_of(size));
        } else {
            self.bitmaps.stop_keeping();
        }
    }

    /// Marks the regions of the range; durable when answered.
    pub(super) async fn mark(&self, file: &Child, size: u64, range: ByteRange) -> Result<()> {
        let _turn = self.turn.lock().await;
        if self.bitmaps.is_kept(range) {
            return Ok(());
        }
        let marked = self.bitmaps.with_kept(|kept| {
            let marked = kept.marked();
            (marked.granularity(), marked.dirty_bytes())
        });
        let Some((region, bytes)) = marked else {
            return Ok(());
        };
        let range = range.align_outward(region);
        let is_full = bytes / region >= self.keeping.most_marked;
        if is_full || self.unsure.get() || self.next_slot(range).is_none() {
            // With what is in flight counted, what is quiet can lose its marks.
            self.bitmaps.unmark_quiet();
            self.store_in_turn(file, size, Purpose::InUse).await?;
        }
        let Some((offset, bytes)) = self.next_slot(range) else {
            unreachable!("a file that was written anew has no marks");
        };
        self.unsure.set(true);
        self.shelf.write_at(offset, bytes).await?;
        self.shelf.sync().await?;
        if let Some(slots) = &mut *self.slots.borrow_mut() {
            slots.advance();
        }
        self.unsure.set(false);
        self.bitmaps.set_kept(range);
        Ok(())
    }

    fn next_slot(&self, range: ByteRange) -> Option<(u64, Vec<u8>)> {
        self.slots.borrow().as_ref()?.next(range)
    }

    /// The node shows another file, which this is no place for.
    pub(super) fn give_up(&self) {
        self.given_up.set(true);
    }

    /// The persistent bitmaps in the order in which they came.
    pub(super) fn persistent(&self) -> Vec<Rc<Bitmap>> {
        let mut all = self.bitmaps.all();
        all.retain(|bitmap| bitmap.is(BitmapFlags::PERSISTENT) && !bitmap.is(BitmapFlags::LEAVING));
        all
    }

    /// One of this name and granularity could be stored, too.
    ///
    /// # Errors
    /// The reason, in QEMU's words.
    pub(super) fn check_new(&self, name: &str, granularity: u64, size: u64) -> Result<()> {
        let mut bits = size.div_ceil(granularity);
        for bitmap in self.persistent() {
            bits = bits.saturating_add(size.div_ceil(bitmap.granularity()));
        }
        let reason = if self.given_up.get() {
            "Its file is another one than it was opened with"
        } else if bits > MOST_BITS {
            "Too much space will be occupied by the bitmap. Use larger granularity"
        } else if name.len() > Bitmap::LONGEST_NAME {
            "Name length exceeds maximum (1023 characters)"
        } else {
            return Ok(());
        };
        let node = &self.node_name;
        let message = format!("Can't make bitmap '{name}' persistent in '{node}': {reason}");
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }
}

impl BitmapStore for super::Raw {
    fn bitmaps(&self) -> &Rc<Bitmaps> {
        self.beside().bitmaps()
    }

    fn check_new(&self, name: &str, granularity: u64) -> Result<()> {
        self.beside().check_new(name, granularity, self.part_size())
    }

    fn update(&self) -> IoFuture<'_, ()> {
        Box::pin(async { self.beside().update(&self.file(), self.part_size()).await })
    }

    fn mark(&self, range: ByteRange) -> IoFuture<'_, ()> {
        let size = self.part_size();
        Box::pin(async move { self.beside().mark(&self.file(), size, range).await })
    }
}

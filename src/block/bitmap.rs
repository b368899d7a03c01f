//! A dirty bitmap of a node as its users know it: with a name, and states in which it may not be changed.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use bitflags::bitflags;

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::DirtyBitmap;

bitflags! {
    /// The states of a [`Bitmap`]; several may hold.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// What is written is recorded.
        const ENABLED = 1;
        /// It is to be stored with the image.
        const PERSISTENT = 2;
        /// Somebody works with it (a job, an export), so that nobody else may.
        const BUSY = 4;
        /// It is stored in an image that may not be written.
        const READ_ONLY = 8;
        /// It was stored by somebody who came to no good end: what it says is not true.
        const INCONSISTENT = 16;
        /// It is about to be removed, and not stored any more.
        const LEAVING = 32;
    }
}

/// Records which parts of a node's content change. Shared by the node and by who works with it.
pub struct Bitmap {
    name: String,
    flags: Cell<BitmapFlags>,
    bits: RefCell<DirtyBitmap>,
    /// Records instead, while the bits are frozen.
    successor: RefCell<Option<DirtyBitmap>>,
    /// What was dirty before a change that may be undone, or that a crash may yet undo elsewhere.
    withheld: RefCell<Option<DirtyBitmap>>,
}

impl Bitmap {
    /// Longest name in bytes.
    pub const LONGEST_NAME: usize = 1023;
    /// Most bits of one, so that a fine granularity of a huge disk cannot take all memory.
    pub const MOST_BITS: u64 = 1 << 36;

    /// With these bits.
    pub fn new(name: impl Into<String>, flags: BitmapFlags, bits: DirtyBitmap) -> Bitmap {
        Bitmap {
            name: name.into(),
            flags: Cell::new(flags),
            bits: RefCell::new(bits),
            successor: RefCell::default(),
            withheld: RefCell::default(),
        }
    }

    /// The name, unique in its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The states that hold.
    pub fn flags(&self) -> BitmapFlags {
        self.flags.get()
    }

    /// These states hold from now on, or do not.
    pub fn set_flags(&self, flags: BitmapFlags, hold: bool) {
        let mut all = self.flags.get();
        all.set(flags, hold);
        self.flags.set(all);
    }

    /// All of these states hold.
    pub fn is(&self, flags: BitmapFlags) -> bool {
        self.flags.get().contains(flags)
    }

    /// Bytes that a bit stands for.
    pub fn granularity(&self) -> u64 {
        self.bits.borrow().granularity()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.bits.borrow().size()
    }

    /// Granularity times bits that are set.
    pub fn dirty_bytes(&self) -> u64 {
        self.bits.borrow().dirty_bytes()
    }

    /// Looks at the bits; they may not change meanwhile.
    pub fn with_bits<T>(&self, look: impl FnOnce(&DirtyBitmap) -> T) -> T {
        look(&self.bits.borrow())
    }

    /// What is dirty now or became so while it was frozen, of parts 64 each from word `first` on. Changes in
    /// flight are not in it.
    pub fn dirty_words(&self, first: usize, words: &mut [u64]) {
        add_words(&self.bits.borrow(), first, words);
        if let Some(successor) = &*self.successor.borrow() {
            add_words(successor, first, words);
        }
    }

    /// What is stored goes on saying that these are dirty, until [`Bitmap::release_withheld`].
    pub fn withhold(&self, bits: &DirtyBitmap) {
        let mut withheld = self.withheld.borrow_mut();
        match &mut *withheld {
            Some(all) => all.merge(bits),
            None => *withheld = Some(bits.clone()),
        }
    }

    /// What is stored may say what is dirty, and no more.
    pub fn release_withheld(&self) {
        *self.withheld.borrow_mut() = None;
    }

    /// What what is stored is to say besides, of parts as in [`Bitmap::dirty_words`].
    pub fn withheld_words(&self, first: usize, words: &mut [u64]) {
        if let Some(withheld) = &*self.withheld.borrow() {
            add_words(withheld, first, words);
        }
    }

    /// Other bits from now on, as an undo or an image has them; answers what they were.
    pub fn replace_bits(&self, bits: DirtyBitmap) -> DirtyBitmap {
        self.bits.replace(bits)
    }

    /// Refuses where one of these states holds, in QEMU's words and order.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`], [`ErrorKind::Permission`] or [`ErrorKind::InvalidArgument`].
    pub fn check_not(&self, states: BitmapFlags) -> Result<()> {
        let hold = self.flags.get() & states;
        let (kind, what) = if hold.contains(BitmapFlags::BUSY) {
            (
                ErrorKind::InUse,
                "currently in use by another operation and cannot be used",
            )
        } else if hold.contains(BitmapFlags::READ_ONLY) {
            (ErrorKind::Permission, "readonly and cannot be modified")
        } else if hold.contains(BitmapFlags::INCONSISTENT) {
            (
                ErrorKind::InvalidArgument,
                "inconsistent and cannot be used",
            )
        } else {
            return Ok(());
        };
        Err(Error::new(
            kind,
            format!("Bitmap '{}' is {what}", self.name),
        ))
    }

    /// The range was changed.
    pub(super) fn record(&self, range: ByteRange) {
        if !self.is(BitmapFlags::ENABLED) {
            return;
        }
        match &mut *self.successor.borrow_mut() {
            Some(successor) => successor.set(range),
            None => self.bits.borrow_mut().set(range),
        };
    }

    /// The disk has another size.
    pub(super) fn resize(&self, size: u64) {
        self.bits.borrow_mut().resize(size);
        for other in [&self.successor, &self.withheld] {
            if let Some(bits) = &mut *other.borrow_mut() {
                bits.resize(size);
            }
        }
    }

    /// Nothing is dirty any more; answers what was, for an undo.
    ///
    /// # Errors
    /// The bitmap may not be changed.
    pub fn clear(&self) -> Result<DirtyBitmap> {
        self.check_not(BitmapFlags::all())?;
        let (size, granularity) = (self.size(), self.granularity());
        Ok(self.replace_bits(DirtyBitmap::new(size, granularity)))
    }

    /// What is dirty in one of `sources`, among which it may be itself, is dirty here, too. All or
    /// nothing. Answers what was before, for an undo.
    ///
    /// # Errors
    /// The bitmap may not be changed, a source may not be used, or is of a disk of another size.
    pub fn merge(&self, sources: &[Rc<Bitmap>]) -> Result<DirtyBitmap> {
        self.check_not(BitmapFlags::all())?;
        let mut merged = self.bits.borrow().clone();
        for source in sources {
            source.check_not(BitmapFlags::BUSY | BitmapFlags::INCONSISTENT)?;
            self.check_size(source)?;
            merged.merge(&source.bits.borrow());
        }
        Ok(self.replace_bits(merged))
    }

    fn check_size(&self, source: &Bitmap) -> Result<()> {
        let (here, there) = (self.size(), source.size());
        if here == there {
            return Ok(());
        }
        let message = format!(
            "Bitmaps are of different sizes (destination size is {here}, source size is {there}) and \
             can't be merged"
        );
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Nobody else may use it until this is dropped; it goes on recording.
    ///
    /// # Errors
    /// The bitmap may not be used.
    pub fn occupy(self: &Rc<Self>) -> Result<BusyBitmap> {
        self.check_not(BitmapFlags::BUSY | BitmapFlags::INCONSISTENT)?;
        self.set_flags(BitmapFlags::BUSY, true);
        Ok(BusyBitmap(self.clone()))
    }

    /// Holds the bits as they are: what changes from now on is recorded beside them.
    ///
    /// # Errors
    /// The bitmap may not be changed.
    pub fn freeze(self: &Rc<Self>) -> Result<FrozenBitmap> {
        self.check_not(BitmapFlags::all())?;
        let successor = DirtyBitmap::new(self.size(), self.granularity());
        *self.successor.borrow_mut() = Some(successor);
        self.set_flags(BitmapFlags::BUSY, true);
        Ok(FrozenBitmap(self.clone()))
    }

    /// Bytes that became dirty since it was frozen; `None` where it is not.
    pub fn dirty_since_frozen(&self) -> Option<u64> {
        let successor = self.successor.borrow();
        successor.as_ref().map(DirtyBitmap::dirty_bytes)
    }

    /// Ends a frozen state: what was recorded meanwhile comes to the bits.
    fn thaw(&self) {
        if let Some(successor) = self.successor.take() {
            self.bits.borrow_mut().merge(&successor);
        }
        self.set_flags(BitmapFlags::BUSY, false);
    }
}

fn add_words(bits: &DirtyBitmap, first: usize, words: &mut [u64]) {
    let from = bits.words().get(first..).unwrap_or_default();
    for (word, more) in words.iter_mut().zip(from) {
        *word |= more;
    }
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bitmap '{}' ({:?})", self.name, self.flags.get())
    }
}

/// A bitmap that somebody works with.
pub struct BusyBitmap(Rc<Bitmap>);

impl BusyBitmap {
    /// The bitmap.
    pub fn bitmap(&self) -> &Rc<Bitmap> {
        &self.0
    }
}

impl Drop for BusyBitmap {
    fn drop(&mut self) {
        self.0.set_flags(BitmapFlags::BUSY, false);
    }
}

/// A bitmap whose bits stay as they are while its changes are recorded beside them. Dropped, both come
/// together: nothing that was dirty is forgotten.
pub struct FrozenBitmap(Rc<Bitmap>);

impl FrozenBitmap {
    /// The bitmap; its bits are those of the moment at which it was frozen.
    pub fn bitmap(&self) -> &Rc<Bitmap> {
        &self.0
    }

    /// The work failed: all that was dirty is so still.
    pub fn reclaim(self) {}

    /// The work is done: dirty is only what changed meanwhile.
    pub fn abdicate(self) {
        let (size, granularity) = (self.0.size(), self.0.granularity());
        self.settle(DirtyBitmap::new(size, granularity));
    }

    /// Dirty is what changed meanwhile, and what these bits say.
    pub fn settle(self, bits: DirtyBitmap) {
        self.0.replace_bits(bits);
    }
}

impl Drop for FrozenBitmap {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 65536;

    fn bitmap(name: &str) -> Rc<Bitmap> {
        let bits = DirtyBitmap::new(16 * PART, PART);
        Rc::new(Bitmap::new(name, BitmapFlags::ENABLED, bits))
    }

    fn part(index: u64) -> ByteRange {
        ByteRange::between(index * PART, (index + 1) * PART)
    }

    fn dirty(bitmap: &Bitmap) -> Vec<u64> {
        bitmap.with_bits(|bits| {
            let starts = |run: ByteRange| (run.start() / PART)..(run.end() / PART);
            bits.runs().flat_map(starts).collect()
        })
    }

    #[test]
    fn a_frozen_one_keeps_what_changes_for_later() {
        let bitmap = bitmap("b");
        bitmap.record(part(1));
        let frozen = bitmap.freeze().expect("free");
        bitmap.record(part(2));
        assert_eq!(dirty(&bitmap), [1]);
        assert_eq!(bitmap.dirty_since_frozen(), Some(PART));
        let error = bitmap.freeze().err().expect("busy");
        let text = "Bitmap 'b' is currently in use by another operation and cannot be used";
        assert_eq!(error.message(), text);
        frozen.abdicate();
        assert_eq!(dirty(&bitmap), [2]);
        bitmap.freeze().expect("free again").reclaim();
        bitmap.record(part(4));
        let frozen = bitmap.freeze().expect("free again");
        bitmap.record(part(5));
        drop(frozen);
        assert_eq!(dirty(&bitmap), [2, 4, 5]);
        let mut left = DirtyBitmap::new(16 * PART, PART);
        left.set(part(9));
        let frozen = bitmap.freeze().expect("free again");
        bitmap.record(part(8));
        frozen.settle(left);
        assert_eq!(dirty(&bitmap), [8, 9]);
    }

    #[test]
    fn one_that_is_frozen_and_disabled_records_nothing() {
        let bitmap = bitmap("b");
        bitmap.set_flags(BitmapFlags::ENABLED, false);
        let frozen = bitmap.freeze().expect("free");
        bitmap.record(part(2));
        frozen.reclaim();
        assert!(dirty(&bitmap).is_empty());
    }

    #[test]
    fn a_merge_that_fails_changes_nothing() {
        let (target, good, busy) = (bitmap("t"), bitmap("g"), bitmap("busy"));
        good.record(part(3));
        busy.record(part(4));
        let held = busy.occupy().expect("free");
        let sources = [good.clone(), busy.clone()];
        assert!(target.merge(&sources).is_err());
        assert!(dirty(&target).is_empty());
        drop(held);
        target.merge(&sources).expect("all free");
        target.merge(std::slice::from_ref(&target)).expect("itself");
        assert_eq!(dirty(&target), [3, 4]);
        let before = target.clear().expect("free");
        assert!(dirty(&target).is_empty());
        target.replace_bits(before);
        assert_eq!(dirty(&target), [3, 4]);
    }
}

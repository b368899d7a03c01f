//! Reading what is kept beside an image, and deciding whether it is true.

use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags, Child, DirtyBitmap};
use crate::error::{Error, Result};
use crate::range::ByteRange;

use super::super::stored::{Entry, Marks, Slots, Stored};
use super::{Beside, Purpose};

impl Beside {
    /// Loads what is stored of an image of `size` bytes that is being opened.
    ///
    /// # Errors
    /// The file is damaged, or somebody else uses it.
    pub(in super::super) async fn load(&self, file: &Child, size: u64) -> Result<()> {
        let context = |error: Error| error.context(format!("Bitmaps in '{}'", self.shelf.name()));
        let read = self.read().await.map_err(context)?;
        let Some((stored, slots, marks)) = read else {
            return Ok(());
        };
        let doubt = self.doubt(&stored, &marks, size).await.map_err(context)?;
        if let Some(why) = doubt {
            let (node, file) = (&self.node_name, self.shelf.name());
            tracing::warn!(node, file, why, "bitmaps are inconsistent");
        }
        let marks = match marks {
            Marks::Ranges(ranges) => ranges,
            Marks::Damaged => Vec::new(),
        };
        for entry in stored.entries {
            let bitmap = match doubt.is_some() || entry.inconsistent {
                true => inconsistent(entry, size),
                false => usable(entry, &marks, stored.in_use, size),
            };
            self.bitmaps.add(Rc::new(bitmap));
        }
        *self.slots.borrow_mut() = Some(slots);
        match self.read_only.get() {
            true => Ok(()),
            false => self.store(file, size, Purpose::InUse).await,
        }
    }

    /// A file that is to be written is locked first.
    async fn read(&self) -> Result<Option<(Stored, Slots, Marks)>> {
        let Some(mut bytes) = self.shelf.read().await? else {
            return Ok(None);
        };
        if !self.read_only.get() {
            self.hold_lock().await?;
            match self.shelf.read().await? {
                Some(again) => bytes = again,
                None => return Ok(None),
            }
        }
        Stored::decode(&bytes).map(Some)
    }

    /// Why the bits may not be true, if they may not.
    async fn doubt(
        &self,
        stored: &Stored,
        marks: &Marks,
        size: u64,
    ) -> Result<Option<&'static str>> {
        if stored.identity != self.shelf.identity().await? {
            return Ok(Some("they are of another image of this name"));
        }
        if *marks == Marks::Damaged {
            return Ok(Some("their marks are damaged"));
        }
        if !stored.in_use {
            let same = stored.size == size && stored.stamp == self.shelf.stamp().await?;
            return Ok((!same).then_some("the image was changed by somebody else"));
        }
        if size < stored.least_size {
            return Ok(Some("the image was made shorter by somebody else"));
        }
        if self.read_only.get() {
            // Whoever writes it now has later bits.
            let locked = self.shelf.lock().await;
            self.shelf.unlock();
            return Ok(locked.is_err().then_some("somebody may be writing them"));
        }
        Ok(None)
    }

    /// What was read or stored is still there, and true.
    pub(super) async fn look_again(&self, size: u64) -> Result<()> {
        let Some(slots) = self.slots.borrow().clone() else {
            return Ok(());
        };
        let is_true = match self.read().await? {
            Some((stored, now, marks)) if now == slots => {
                self.doubt(&stored, &marks, size).await?.is_none()
            }
            _ => false,
        };
        if is_true {
            return Ok(());
        }
        let (node, file) = (&self.node_name, self.shelf.name());
        tracing::warn!(
            node,
            file,
            "bitmaps are inconsistent: somebody else was at the image"
        );
        for bitmap in self.persistent() {
            bitmap.set_flags(BitmapFlags::INCONSISTENT, true);
            bitmap.set_flags(BitmapFlags::ENABLED, false);
        }
        Ok(())
    }
}

fn inconsistent(entry: Entry, size: u64) -> Bitmap {
    let flags = BitmapFlags::PERSISTENT | BitmapFlags::READ_ONLY | BitmapFlags::INCONSISTENT;
    let bits = DirtyBitmap::new(size, entry.bits.granularity());
    Bitmap::new(entry.name, flags, bits)
}

/// What was marked is dirty, and so is what came since the size was stored.
fn usable(entry: Entry, marks: &[ByteRange], in_use: bool, size: u64) -> Bitmap {
    let mut bits = entry.bits;
    let known = bits.size();
    bits.resize(size);
    if in_use && entry.enabled {
        for range in marks {
            bits.set(*range);
        }
        if size > known {
            bits.set(ByteRange::between(known, size));
        }
    }
    let mut flags = BitmapFlags::PERSISTENT | BitmapFlags::READ_ONLY;
    flags.set(BitmapFlags::ENABLED, entry.enabled);
    Bitmap::new(entry.name, flags, bits)
}

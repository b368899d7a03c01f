//! A user's bitmap in a backup: what it selects, and what is dirty in it afterwards.

use std::rc::Rc;

use super::BackupSync;
use crate::block::{Bitmap, BitmapFlags, BusyBitmap, DirtyBitmap, FrozenBitmap, Node};
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// What becomes of what was dirty in a bitmap when a backup began. What a guest changes meanwhile is
/// dirty afterwards in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// It is clean if the backup succeeds; else it stays.
    OnSuccess,
    /// It stays.
    Never,
    /// It is clean as far as it was copied, however the backup ends.
    Always,
}

/// A bitmap that a backup works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupBitmap {
    /// Its name; it is one of the source's.
    pub name: String,
    /// What becomes of it.
    pub mode: BitmapMode,
}

impl BackupBitmap {
    /// The bitmap, which can be used so.
    ///
    /// # Errors
    /// In QEMU's words: there is none, or it may not be used.
    pub fn find(&self, source: &Node) -> Result<Rc<Bitmap>> {
        let Some(bitmap) = source.bitmaps().find(&self.name) else {
            let message = format!("Bitmap '{}' could not be found", self.name);
            return Err(Error::refused(message));
        };
        bitmap.check_not(match self.mode {
            BitmapMode::Never => BitmapFlags::BUSY | BitmapFlags::INCONSISTENT,
            _ => BitmapFlags::BUSY | BitmapFlags::INCONSISTENT | BitmapFlags::READ_ONLY,
        })?;
        Ok(bitmap)
    }
}

/// The bitmap while the backup works with it.
pub(super) struct Tracking {
    held: Held,
    mode: BitmapMode,
    sync: BackupSync,
    /// What was dirty at the backup's moment.
    dirty: DirtyBitmap,
}

enum Held {
    /// It goes on as it was.
    Unchanged {
        _busy: BusyBitmap,
    },
    Frozen(FrozenBitmap),
}

impl Tracking {
    /// At the backup's moment: no change is in flight.
    pub(super) fn begin(
        wanted: &BackupBitmap,
        bitmap: &Rc<Bitmap>,
        sync: BackupSync,
    ) -> Result<Tracking> {
        let dirty = bitmap.with_bits(DirtyBitmap::clone);
        let held = match wanted.mode {
            BitmapMode::Never => Held::Unchanged {
                _busy: bitmap.occupy()?,
            },
            _ => Held::Frozen(bitmap.freeze()?),
        };
        Ok(Tracking {
            held,
            mode: wanted.mode,
            sync,
            dirty,
        })
    }

    /// What the backup copies, where the bitmap says that.
    pub(super) fn selected(&self) -> Option<DirtyBitmap> {
        (self.sync == BackupSync::Bitmap).then(|| self.dirty.clone())
    }

    /// A backup that fails is to say what it has left out.
    pub(super) fn wants_rest(&self) -> bool {
        self.mode == BitmapMode::Always
    }

    /// All was copied.
    pub(super) fn copied(self) {
        if let Held::Frozen(frozen) = self.held {
            frozen.abdicate();
        }
    }

    /// All but this was copied.
    pub(super) fn copied_but(self, rest: &DirtyBitmap) {
        let mut left = DirtyBitmap::new(self.dirty.size(), self.dirty.granularity());
        for run in rest.runs() {
            match self.sync {
                BackupSync::Bitmap => set_common(&mut left, &self.dirty, run),
                _ => drop(left.set(run)),
            }
        }
        if let Held::Frozen(frozen) = self.held {
            frozen.settle(left);
        }
    }

    /// Nothing was copied that counts.
    pub(super) fn not_copied(self) {
        if let Held::Frozen(frozen) = self.held {
            frozen.reclaim();
        }
    }
}

/// Sets what is set in `of` within a range.
fn set_common(bits: &mut DirtyBitmap, of: &DirtyBitmap, range: ByteRange) {
    let mut start = range.start();
    while let Some(run) = of.next_run(start, u64::MAX) {
        if run.start() >= range.end() {
            break;
        }
        bits.set(ByteRange::between(run.start(), run.end().min(range.end())));
        start = run.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 4096;

    fn part(first: u64, end: u64) -> ByteRange {
        ByteRange::between(first * PART, end * PART)
    }

    fn bits(ranges: &[ByteRange]) -> DirtyBitmap {
        let mut bits = DirtyBitmap::new(64 * PART, PART);
        for range in ranges {
            bits.set(*range);
        }
        bits
    }

    fn tracked(mode: BitmapMode, sync: BackupSync) -> (Rc<Bitmap>, Tracking) {
        let dirty = bits(&[part(1, 3), part(20, 24)]);
        let bitmap = Rc::new(Bitmap::new("b", BitmapFlags::ENABLED, dirty));
        let wanted = BackupBitmap {
            name: "b".to_owned(),
            mode,
        };
        let tracking = Tracking::begin(&wanted, &bitmap, sync).expect("nobody uses it");
        (bitmap, tracking)
    }

    fn left(bitmap: &Bitmap) -> DirtyBitmap {
        assert!(!bitmap.is(BitmapFlags::BUSY));
        bitmap.with_bits(DirtyBitmap::clone)
    }

    #[test]
    fn what_was_not_copied_stays_dirty_of_what_was() {
        let (bitmap, tracking) = tracked(BitmapMode::Always, BackupSync::Bitmap);
        // Clusters of 16 parts: the second was not copied.
        tracking.copied_but(&bits(&[part(16, 32)]));
        assert_eq!(left(&bitmap), bits(&[part(20, 24)]));
    }

    #[test]
    fn all_that_a_full_backup_has_not_copied_is_dirty() {
        let (bitmap, tracking) = tracked(BitmapMode::Always, BackupSync::Full);
        tracking.copied_but(&bits(&[part(16, 32)]));
        assert_eq!(left(&bitmap), bits(&[part(16, 32)]));
    }

    #[test]
    fn a_failure_leaves_a_bitmap_as_it_was() {
        for mode in [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always] {
            let (bitmap, tracking) = tracked(mode, BackupSync::Bitmap);
            tracking.not_copied();
            assert_eq!(left(&bitmap), bits(&[part(1, 3), part(20, 24)]), "{mode:?}");
        }
    }

    #[test]
    fn success_cleans_a_bitmap_unless_it_is_never_to_change() {
        for (mode, clean) in [
            (BitmapMode::OnSuccess, true),
            (BitmapMode::Never, false),
            (BitmapMode::Always, true),
        ] {
            let (bitmap, tracking) = tracked(mode, BackupSync::Bitmap);
            tracking.copied();
            assert_eq!(left(&bitmap).is_clean(), clean, "{mode:?}");
        }
    }
}

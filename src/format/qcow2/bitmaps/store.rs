//! Storing bitmaps: a new directory and new tables, which the header names in one write.

use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags, DirtyBitmap};
use crate::error::Result;
use crate::range::ByteRange;

use super::super::Qcow2;
use super::super::allocator::Allocation;
use super::super::header::Autoclear;
use super::super::layout::HostOffset;
use super::directory::{self, Entry, EntryFlags, Part, Place};
use super::{Directory, State, StoredBitmap};

/// What bitmaps are stored for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Purpose {
    /// The image is about to be written: what is stored has all that is dirty.
    Opening,
    /// It is being written, and bitmaps have changed otherwise than by writes.
    InUse,
    /// It is not written any more: what is stored is what is dirty.
    Closing,
}

/// A directory in the making.
struct Draft {
    purpose: Purpose,
    directory: Directory,
    /// Clusters for it, which are given back when it fails.
    taken: Vec<Allocation>,
    /// What nothing names any more when it is there.
    freed: Vec<(HostOffset, u64)>,
}

impl Qcow2 {
    /// Stores the persistent bitmaps as they are; durable when answered.
    ///
    /// # Errors
    /// What is stored is as it was, or has all that is dirty.
    pub(in super::super) async fn store_bitmaps(&self, purpose: Purpose) -> Result<()> {
        let _turn = self.bitmaps.turn.take().await;
        self.store_in_turn(purpose).await
    }

    pub(super) async fn store_in_turn(&self, purpose: Purpose) -> Result<()> {
        let nothing = self.bitmaps.directory.borrow().entries.is_empty();
        if nothing && self.persistent_bitmaps().is_empty() {
            return Ok(());
        }
        self.check_health()?;
        let mut draft = Draft {
            purpose,
            directory: Directory::default(),
            taken: Vec::new(),
            freed: Vec::new(),
        };
        if let Err(error) = self.write_draft(&mut draft).await {
            for allocation in draft.taken {
                self.release(allocation).await;
            }
            return Err(error.context("Could not store bitmaps"));
        }
        // From here on the disk may have the new directory.
        let written = self.write_bitmap_header(&draft).await;
        written.map_err(|error| error.context("Could not store bitmaps"))?;
        self.adopt(draft);
        Ok(())
    }

    async fn write_draft(&self, draft: &mut Draft) -> Result<()> {
        // What a crash may undo is dirty, too, until it may not any more.
        self.flush_all().await?;
        self.plan_entries(draft).await;
        for index in 0..draft.directory.entries.len() {
            self.write_bits(draft, index).await?;
        }
        for index in 0..draft.directory.entries.len() {
            self.write_bitmap_table(draft, index).await?;
        }
        self.write_directory(draft).await?;
        // The refcounts of all that, too.
        self.flush_all().await
    }

    /// The entries to be: those of bitmaps that are gone go, those of new ones come.
    async fn plan_entries(&self, draft: &mut Draft) {
        let before = self.bitmaps.directory.borrow().clone();
        if let Some(Place { offset, bytes }) = before.place {
            draft.freed.push((offset, bytes));
        }
        let in_use = draft.purpose != Purpose::Closing;
        let mut left = self.persistent_bitmaps();
        let mut fresh_from = 0;
        for mut stored in before.entries {
            let name = stored.name().map(str::to_owned);
            let bitmap = name.as_ref().map(|name| {
                let found = left.iter().position(|bitmap| bitmap.name() == name);
                found.map(|position| left.remove(position))
            });
            match bitmap {
                None => self.plan_foreign(&mut stored, in_use),
                Some(None) => {
                    draft.freed.extend(self.places_of(&stored).await);
                    continue;
                }
                Some(Some(bitmap)) => self.plan_own(draft, &mut stored, &bitmap),
            }
            stored.is_new &= in_use;
            fresh_from += usize::from(!stored.is_new);
            draft.directory.entries.push(stored);
        }
        // New ones stand before older new ones, as QEMU stores them.
        for bitmap in left {
            let mut stored = StoredBitmap {
                entry: Entry::new(bitmap.name(), bitmap.granularity()),
                state: State::Used(Vec::new()),
                is_new: in_use,
            };
            self.plan_own(draft, &mut stored, &bitmap);
            draft.directory.entries.insert(fresh_from, stored);
        }
    }

    /// One that would have to be kept up to date is not.
    fn plan_foreign(&self, stored: &mut StoredBitmap, in_use: bool) {
        if in_use && stored.entry.flags.contains(EntryFlags::AUTO) {
            stored.entry.flags |= EntryFlags::IN_USE;
        }
    }

    fn plan_own(&self, draft: &mut Draft, stored: &mut StoredBitmap, bitmap: &Bitmap) {
        let length = self.bitmap_table_length(stored.granularity()) as usize;
        let State::Used(table) = &mut stored.state else {
            return;
        };
        let is_enabled = bitmap.is(BitmapFlags::ENABLED);
        stored.entry.flags.set(EntryFlags::AUTO, is_enabled);
        let in_use = draft.purpose != Purpose::Closing;
        stored.entry.flags.set(EntryFlags::IN_USE, in_use);
        if stored.entry.length > 0 {
            let bytes = u64::from(stored.entry.length) * 8;
            draft.freed.push((stored.entry.table, bytes));
        }
        for part in table.drain(length.min(table.len())..) {
            draft.freed.extend(self.cluster_of(part));
        }
    }

    pub(super) fn cluster_of(&self, part: Part) -> Option<(HostOffset, u64)> {
        match part {
            Part::Stored(offset) => Some((offset, self.geometry.cluster_size())),
            Part::Clean | Part::Dirty => None,
        }
    }

    /// Writes the bits of one bitmap, and makes its table as long as it must be.
    async fn write_bits(&self, draft: &mut Draft, index: usize) -> Result<()> {
        let stored = &mut draft.directory.entries[index];
        let (granularity, name) = (stored.granularity(), stored.name().map(str::to_owned));
        let bitmap = name.and_then(|name| self.bitmaps.bitmaps.find(&name));
        let (State::Used(table), Some(bitmap)) = (&mut stored.state, bitmap) else {
            return Ok(());
        };
        let length = self.bitmap_table_length(granularity) as usize;
        let known = table.len();
        table.resize(length, Part::Clean);
        let mut table = std::mem::take(table);
        let first = if draft.purpose == Purpose::Opening {
            known
        } else {
            0
        };
        let mut result = Ok(());
        for (number, part) in table.iter_mut().enumerate().skip(first) {
            result = self.write_part(draft, &bitmap, number, part).await;
            if result.is_err() {
                break;
            }
        }
        draft.directory.entries[index].state = State::Used(table);
        result
    }

    async fn write_part(
        &self,
        draft: &mut Draft,
        bitmap: &Rc<Bitmap>,
        number: usize,
        part: &mut Part,
    ) -> Result<()> {
        let is_closing = draft.purpose == Purpose::Closing;
        let bytes = self.bits_for_disk(bitmap, number, !is_closing, None);
        let is_clean = bytes.iter().all(|byte| *byte == 0);
        match *part {
            Part::Stored(_) if is_clean && is_closing => {
                draft.freed.extend(self.cluster_of(*part));
                *part = Part::Clean;
            }
            Part::Stored(offset) => self.write_metadata(offset, &bytes).await?,
            Part::Clean | Part::Dirty if is_clean => *part = Part::Clean,
            Part::Clean | Part::Dirty => {
                let allocation = self.allocate(1).await?;
                draft.taken.push(allocation);
                let offset = self.geometry.host_offset(allocation.first);
                self.write_metadata(offset, &bytes).await?;
                *part = Part::Stored(offset);
            }
        }
        Ok(())
    }

    /// A cluster of bits: what is dirty, and with `marks` what is withheld from a change that may be undone and
    /// what may become dirty unnoticed, which are the marked regions and those of `more`.
    pub(super) fn bits_for_disk(
        &self,
        bitmap: &Bitmap,
        number: usize,
        marks: bool,
        more: Option<ByteRange>,
    ) -> Vec<u8> {
        let granularity = bitmap.granularity();
        let coverage = self.bitmap_coverage(granularity);
        let mut words = vec![0; (self.geometry.cluster_size() / 8) as usize];
        bitmap.dirty_words(number * words.len(), &mut words);
        if marks {
            bitmap.withheld_words(number * words.len(), &mut words);
        }
        if marks && bitmap.is(BitmapFlags::ENABLED) {
            let start = (number as u64).saturating_mul(coverage);
            let end = start.saturating_add(coverage).min(self.size.get());
            let window = ByteRange::between(start.min(end), end);
            let mut bits = DirtyBitmap::new(window.length(), granularity);
            bits.set_words(0, &words);
            let mut add = |range: ByteRange| {
                if let Some(inside) = range.intersection(&window) {
                    bits.set(ByteRange::between(
                        inside.start() - start,
                        inside.end() - start,
                    ));
                }
            };
            more.into_iter().for_each(&mut add);
            self.bitmaps.bitmaps.with_kept(|kept| {
                let mut from = window.start();
                while let Some(run) = kept.marked().next_run(from, window.length()) {
                    if run.start() >= window.end() {
                        break;
                    }
                    add(run);
                    from = run.end();
                }
            });
            let length = bits.words().len();
            words[..length].copy_from_slice(bits.words());
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    async fn write_bitmap_table(&self, draft: &mut Draft, index: usize) -> Result<()> {
        let bytes = match &draft.directory.entries[index].state {
            State::Used(table) => table_bytes(table),
            State::Foreign | State::Inconsistent => return Ok(()),
        };
        let offset = self.write_new_metadata(&mut draft.taken, &bytes).await?;
        let entry = &mut draft.directory.entries[index].entry;
        (entry.table, entry.length) = (offset, (bytes.len() / 8) as u32);
        Ok(())
    }

    async fn write_directory(&self, draft: &mut Draft) -> Result<()> {
        let entries = draft.directory.entries.iter();
        let bytes = directory::serialise(entries.map(|stored| &stored.entry));
        if !bytes.is_empty() {
            let offset = self.write_new_metadata(&mut draft.taken, &bytes).await?;
            draft.directory.place = Some(Place {
                offset,
                bytes: bytes.len() as u64,
            });
        }
        Ok(())
    }

    async fn write_bitmap_header(&self, draft: &Draft) -> Result<()> {
        let Directory { place, entries, .. } = &draft.directory;
        let mut autoclear = Autoclear::empty();
        if place.is_some() {
            autoclear |= Autoclear::BITMAPS;
        }
        // With inconsistent ones among them the bit would make them good.
        let inconsistent = entries.iter();
        let mut inconsistent =
            inconsistent.filter(|stored| matches!(stored.state, State::Inconsistent));
        if place.is_some() && draft.purpose != Purpose::Closing && inconsistent.next().is_none() {
            autoclear |= Autoclear::BITMAPS_KEPT;
        }
        let place = place.map(|place| (place, entries.len()));
        self.update_header(|header| {
            directory::set_place(header, place);
            header.autoclear = autoclear;
        })
        .await
    }

    fn adopt(&self, draft: Draft) {
        for Allocation { first, count, .. } in draft.taken {
            self.metadata.borrow_mut().insert(first, count);
        }
        for (offset, bytes) in draft.freed {
            self.forget_metadata(offset, bytes);
        }
        let entries = draft.directory.entries.iter();
        let uses = entries.filter(|stored| matches!(stored.state, State::Used(_)));
        let keeps = uses.count() > 0 && draft.purpose != Purpose::Closing;
        *self.bitmaps.directory.borrow_mut() = draft.directory;
        let is_closing = draft.purpose == Purpose::Closing;
        for bitmap in self.persistent_bitmaps() {
            bitmap.set_flags(BitmapFlags::READ_ONLY, is_closing);
        }
        if keeps {
            let size = self.size.get();
            let region = self.bitmaps.keeping.region_of(size);
            self.bitmaps.bitmaps.keep(size, region);
        } else {
            self.bitmaps.bitmaps.stop_keeping();
        }
    }
}

pub(super) fn table_bytes(table: &[Part]) -> Vec<u8> {
    let entries = table.iter();
    entries
        .flat_map(|part| part.entry().to_be_bytes())
        .collect()
}

//! Reading bitmaps when an image is opened.

use std::rc::Rc;

use crate::block::{Bitmap, BitmapFlags, DirtyBitmap};
use crate::error::{Error, ErrorKind, Result};
use crate::range::{ByteRange, align_up};

use super::super::Qcow2;
use super::super::header::{Autoclear, invalid};
use super::super::layout::HostOffset;
use super::super::table::big_endian;
use super::directory::{self, Entry, EntryFlags, Part, Place};
use super::{Directory, MAX_TABLE, State, StoredBitmap};

/// Most bits of all bitmaps of an image: 1 GiB of memory.
const MOST_BITS: u64 = 1 << 33;

impl Qcow2 {
    /// Loads the bitmaps of an image that is opened.
    ///
    /// # Errors
    /// The directory is broken; one of the bitmaps cannot be read.
    pub(in super::super) async fn load_bitmaps(&self) -> Result<()> {
        let found = {
            let header = self.header.borrow();
            if !header.autoclear.contains(Autoclear::BITMAPS) {
                return Ok(());
            }
            directory::place(&header)?
        };
        let Some((place, count)) = found else {
            return Ok(());
        };
        let bytes = self.read_bitmap_metadata("Bitmap directory", place.offset, place.bytes);
        let entries = directory::parse(&bytes.await?, count)?;
        let mut loaded = Directory {
            place: Some(place),
            ..Directory::default()
        };
        let mut bits = 0;
        for entry in entries {
            let state = self.load_bitmap(&entry, &mut bits).await?;
            loaded.entries.push(StoredBitmap {
                entry,
                state,
                is_new: false,
            });
        }
        *self.bitmaps.directory.borrow_mut() = loaded;
        Ok(())
    }

    async fn load_bitmap(&self, entry: &Entry, bits: &mut u64) -> Result<State> {
        let known = &self.bitmaps.bitmaps;
        let Some(name) = entry
            .usable_name()
            .filter(|name| known.find(name).is_none())
        else {
            return Ok(State::Foreign);
        };
        let granularity = 1 << entry.granularity_bits;
        *bits += self.size.get().div_ceil(granularity);
        if *bits > MOST_BITS {
            let message = format!("Bitmap '{name}' would take too much memory");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut flags = BitmapFlags::PERSISTENT | BitmapFlags::READ_ONLY;
        let mut content = DirtyBitmap::new(self.size.get(), granularity);
        let is_kept = self
            .header
            .borrow()
            .autoclear
            .contains(Autoclear::BITMAPS_KEPT);
        let mut state = State::Inconsistent;
        if entry.flags.contains(EntryFlags::IN_USE) && !is_kept {
            flags |= BitmapFlags::INCONSISTENT;
        } else {
            flags.set(BitmapFlags::ENABLED, entry.flags.contains(EntryFlags::AUTO));
            let table = self.load_bits(entry, &mut content).await;
            state = State::Used(table.map_err(|error| error.context(format!("Bitmap '{name}'")))?);
        }
        known.add(Rc::new(Bitmap::new(name, flags, content)));
        Ok(state)
    }

    /// A table that is too short was to grow with the disk when the last writer ended: what it does not
    /// tell of is dirty.
    async fn load_bits(&self, entry: &Entry, content: &mut DirtyBitmap) -> Result<Vec<Part>> {
        let granularity = content.granularity();
        let needed = self.bitmap_table_length(granularity);
        if u64::from(entry.length) > MAX_TABLE {
            return Err(invalid(format!(
                "a table of {} entries is too long",
                entry.length
            )));
        }
        self.check_place("Bitmap table", entry.table, u64::from(entry.length) * 8)?;
        let length = u64::from(entry.length).min(needed);
        let table = self.read_bitmap_metadata("Bitmap table", entry.table, length * 8);
        let table = table.await?;
        let cluster_size = self.geometry.cluster_size();
        let parts: Vec<Part> = table
            .chunks_exact(8)
            .map(|entry| Part::parse(big_endian(entry), cluster_size))
            .collect::<Result<_>>()?;
        let words = (cluster_size / 8) as usize;
        let coverage = self.bitmap_coverage(granularity);
        for (index, part) in parts.iter().enumerate() {
            match part {
                Part::Clean => {}
                Part::Dirty => {
                    let start = (index as u64).saturating_mul(coverage);
                    let end = start.saturating_add(coverage).min(content.size());
                    content.set(ByteRange::between(start.min(end), end));
                }
                Part::Stored(offset) => {
                    let bytes = self.read_bitmap_metadata("Bitmap", *offset, cluster_size);
                    content.set_words(index * words, &little_endian(&bytes.await?));
                }
            }
        }
        let told = length.saturating_mul(coverage).min(content.size());
        content.set(ByteRange::between(told, content.size()));
        Ok(parts)
    }

    async fn read_bitmap_metadata(
        &self,
        what: &str,
        offset: HostOffset,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        self.check_place(what, offset, bytes)?;
        let read = self.read_metadata(offset, bytes as usize).await;
        read.map_err(|error| error.context(format!("Could not read {what}")))
    }

    /// Aligned, and inside the file.
    fn check_place(&self, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
        let file_size = self.file().node().size();
        let end = align_up(file_size, self.geometry.cluster_size()).unwrap_or(u64::MAX);
        let aligned = self.geometry.in_cluster(offset.0) == 0;
        let inside = offset.0.checked_add(bytes).is_some_and(|last| last <= end);
        if !aligned || !inside {
            let message = format!(
                "{what} at {offset} of {bytes:#x} bytes is not aligned or ends past the end of the \
                 image file ({end:#x})"
            );
            return Err(invalid(message));
        }
        Ok(())
    }

    /// What bitmaps hold of the file, all that can be found: places and bytes.
    pub(in super::super) async fn bitmap_places(&self) -> Vec<(HostOffset, u64)> {
        let directory = self.bitmaps.directory.borrow().clone();
        let own = directory
            .place
            .map(|Place { offset, bytes }| (offset, bytes));
        let mut places: Vec<(HostOffset, u64)> = own.into_iter().collect();
        for stored in &directory.entries {
            places.extend(self.places_of(stored).await);
        }
        places
    }

    /// Where bitmaps are is not written by anybody else.
    ///
    /// # Errors
    /// Something else is there, too.
    pub(in super::super) fn claim_bitmaps(&self) -> Result<()> {
        let directory = self.bitmaps.directory.borrow();
        let own = directory
            .place
            .map(|Place { offset, bytes }| (offset, bytes));
        let mut places: Vec<(HostOffset, u64)> = own.into_iter().collect();
        for stored in &directory.entries {
            let table = stored.table();
            if !table.is_empty() {
                places.push((stored.entry.table, u64::from(stored.entry.length) * 8));
            }
            places.extend(table.iter().filter_map(|part| self.cluster_of(*part)));
        }
        let mut metadata = self.metadata.borrow_mut();
        for (offset, bytes) in places {
            let first = self.geometry.host_cluster(offset);
            metadata.add("bitmap", first, self.geometry.clusters_for(bytes).0)?;
        }
        Ok(())
    }

    /// The table of a bitmap and its clusters. A table that was not read is read for it, as far as it makes
    /// sense: whoever marked it in use may have left anything.
    pub(super) async fn places_of(&self, stored: &StoredBitmap) -> Vec<(HostOffset, u64)> {
        let Entry { table, length, .. } = &stored.entry;
        let parts = match &stored.state {
            State::Used(parts) => parts.clone(),
            State::Inconsistent | State::Foreign => self.read_parts(*table, *length).await,
        };
        let mut places = Vec::new();
        if !parts.is_empty() {
            places.push((*table, u64::from(*length) * 8));
        }
        let end = self.file().node().size();
        for part in parts {
            if let Part::Stored(offset) = part
                && offset.0 < end
            {
                places.push((offset, self.geometry.cluster_size()));
            }
        }
        places
    }

    async fn read_parts(&self, table: HostOffset, length: u32) -> Vec<Part> {
        if u64::from(length) > MAX_TABLE || table.0 == 0 {
            return Vec::new();
        }
        let read = self.read_bitmap_metadata("Bitmap table", table, u64::from(length) * 8);
        let bytes = match read.await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(node = self.node_name, %error, "clusters of a bitmap are unknown");
                return Vec::new();
            }
        };
        let cluster_size = self.geometry.cluster_size();
        let entries = bytes.chunks_exact(8).map(big_endian);
        entries
            .map(|entry| Part::parse(entry, cluster_size).unwrap_or(Part::Clean))
            .collect()
    }
}

fn little_endian(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    words
        .map(|word| {
            let bytes = word.iter().rev();
            bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
        })
        .collect()
}

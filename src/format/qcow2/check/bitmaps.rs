//! What persistent bitmaps hold: their directory, tables and clusters.

use super::super::extension::BITMAPS;
use super::{Check, FindingKind, words};

/// Bits 9 to 55 of a bitmap table entry: a cluster.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes of the fixed part of a directory entry.
const ENTRY: usize = 24;
/// Most bytes of a directory, as in QEMU.
const MAX_DIRECTORY: u64 = 64 << 20;
/// Most entries of a bitmap table, as in QEMU.
const MAX_TABLE: u64 = 0x800_0000;

impl Check<'_> {
    /// Counts what the bitmaps extension refers to.
    pub(super) async fn walk_bitmaps(&mut self) {
        let extensions = &self.header.extensions;
        let Some(extension) = extensions.iter().find(|other| other.magic == BITMAPS) else {
            return;
        };
        let [_, size, offset] = words(&extension.data)[..] else {
            self.bitmap_error("the bitmaps extension has not 24 bytes");
            return;
        };
        if size > MAX_DIRECTORY || offset.saturating_add(size) > self.file_size {
            self.bitmap_error("the bitmap directory is too large or lies past the end of the file");
            return;
        }
        self.refer("bitmap directory", offset, size);
        match self.read(offset, size).await {
            Ok(directory) => self.walk_directory(&directory).await,
            Err(error) => self.bitmap_error(&format!("the bitmap directory: {error}")),
        }
    }

    fn bitmap_error(&mut self, message: &str) {
        self.result
            .add(FindingKind::Error, format!("ERROR: {message}"));
    }

    async fn walk_directory(&mut self, directory: &[u8]) {
        let mut rest = directory;
        while rest.len() >= ENTRY {
            let number = |start: usize, length: usize| {
                rest[start..start + length]
                    .iter()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte))
            };
            let (table, entries) = (number(0, 8), number(8, 4));
            let names = number(18, 2) + number(20, 4);
            let length = (ENTRY as u64 + names).next_multiple_of(8) as usize;
            if length > rest.len() || entries > MAX_TABLE {
                self.bitmap_error("a bitmap directory entry is broken");
                return;
            }
            self.walk_table(table, entries).await;
            rest = &rest[length..];
        }
    }

    async fn walk_table(&mut self, table: u64, entries: u64) {
        let cluster_size = self.header.geometry.cluster_size();
        if table.saturating_add(entries * 8) > self.file_size {
            self.result.corruption(format!(
                "ERROR bitmap table at {table:#x} lies past the end of the file"
            ));
            return;
        }
        self.refer("bitmap table", table, entries * 8);
        let Some(clusters) = self.read_words("bitmap table", table, entries).await else {
            return;
        };
        for offset in clusters.into_iter().map(|entry| entry & OFFSET_MASK) {
            if offset != 0 {
                self.refer("bitmap cluster", offset, cluster_size);
            }
        }
    }
}

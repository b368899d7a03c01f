//! Bytes of another open file, as what a write writes.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;

use super::{MEMORY_ALIGNMENT, MemorySlice};
use crate::error::{Error, Result};
use crate::range::{ByteRange, is_aligned};

/// An open file whose bytes are to be written elsewhere.
#[derive(Debug)]
pub struct SourceFile {
    /// Open for reading.
    pub descriptor: Arc<OwnedFd>,
    /// Reads of other offsets, lengths or memory than multiples of this many bytes fail; a power of two.
    pub alignment: u32,
    /// The descriptor reads past the page cache.
    pub direct: bool,
    /// Number of the file system it lies on (`st_dev`).
    pub device: u64,
    /// As messages call it.
    pub name: String,
}

/// A part of a [`SourceFile`], cheap to clone and to slice; may be sent to a helper thread.
///
/// Who makes one sees to it that the bytes do not change until the write has ended.
#[derive(Clone)]
pub struct FileSlice {
    file: Arc<SourceFile>,
    start: u64,
    length: u64,
    /// The first errno of a read through this slice or a part of it; 0: none.
    failure: Arc<AtomicI32>,
}

impl FileSlice {
    /// The bytes of `range` of the file.
    pub fn new(file: SourceFile, range: ByteRange) -> FileSlice {
        FileSlice {
            file: Arc::new(file),
            start: range.start(),
            length: range.length(),
            failure: Arc::default(),
        }
    }

    /// What file it is a part of.
    pub fn file(&self) -> &SourceFile {
        &self.file
    }

    /// First byte in the file.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes in the slice.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// `length` bytes from `start`, which must be inside.
    pub fn slice(&self, start: u64, length: u64) -> FileSlice {
        self.check(start, length);
        FileSlice {
            start: self.start + start,
            length,
            ..self.clone()
        }
    }

    /// Fills `into` with the bytes from `offset` on; past the end of the file with zeroes. Blocks.
    ///
    /// # Errors
    /// The errno of pread(2), which [`FileSlice::read_error`] then tells too.
    pub fn read(&self, offset: u64, into: &MemorySlice) -> Result<()> {
        self.check(offset, into.length() as u64);
        let at = self.start + offset;
        let result = self.read_file(at, into);
        result.map_err(|errno| {
            self.note_failure(errno);
            self.error_of(errno)
        })
    }

    /// Why a read through this slice or a part of it failed, if one did: what tells who wrote it
    /// which side was at fault.
    pub fn read_error(&self) -> Option<Error> {
        match self.failure.load(Ordering::Acquire) {
            0 => None,
            errno => Some(self.error_of(Errno::from_raw(errno))),
        }
    }

    fn note_failure(&self, errno: Errno) {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        // A later failure says nothing new.
        let _ = self
            .failure
            .compare_exchange(0, errno as i32, success, failure);
    }

    fn error_of(&self, errno: Errno) -> Error {
        let (name, start) = (&self.file.name, self.start);
        Error::sys(errno, format!("read of '{name}' from {start:#x} on"))
    }

    fn read_file(&self, at: u64, into: &MemorySlice) -> Result<(), Errno> {
        let alignment = u64::from(self.file.alignment);
        let length = into.length() as u64;
        let memory = (alignment as usize).min(MEMORY_ALIGNMENT);
        if is_aligned(at | length, alignment) && into.is_aligned(memory) {
            return self.read_aligned(at, into);
        }
        let outer = ByteRange::between(at, at + length).align_outward(alignment);
        let bounce = MemorySlice::zeroed(outer.length() as usize);
        self.read_aligned(outer.start(), &bounce)?;
        let skip = (at - outer.start()) as usize;
        into.copy_from(0, &bounce.slice(skip, into.length()));
        Ok(())
    }

    fn read_aligned(&self, at: u64, into: &MemorySlice) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.length() {
            let rest = into.slice(done, into.length() - done);
            let read = rest.read_from(&self.file.descriptor, at + done as u64)?;
            done += read;
            let direct_end = !is_aligned(done as u64, u64::from(self.file.alignment));
            if read == 0 || direct_end {
                into.fill(done, into.length() - done, 0);
                break;
            }
        }
        Ok(())
    }

    fn check(&self, start: u64, length: u64) {
        let end = start.checked_add(length);
        assert!(
            end.is_some_and(|end| end <= self.length),
            "{length} bytes from {start} are not inside a slice of {}",
            self.length
        );
    }
}

impl fmt::Debug for FileSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FileSlice { start, length, .. } = self;
        write!(f, "'{}' {start:#x}+{length:#x}", self.file.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Payload;

    fn source(content: &[u8], alignment: u32) -> SourceFile {
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, content).expect("written");
        SourceFile {
            descriptor: Arc::new(file.into()),
            alignment,
            direct: alignment > 1,
            device: 0,
            name: "f".into(),
        }
    }

    #[test]
    fn any_part_can_be_read_also_where_the_file_wants_alignment() {
        let bytes: Vec<u8> = (0..9000_u32).map(|at| (at / 7) as u8).collect();
        for alignment in [1, 512, 4096] {
            let file = source(&bytes, alignment);
            let slice = FileSlice::new(file, ByteRange::between(100, 9100));
            let part = slice.slice(13, 8800);
            let memory = MemorySlice::zeroed(700).slice(1, 600);
            part.read(450, &memory).expect("inside");
            assert_eq!(memory.to_vec(), &bytes[563..1163]);
            memory.fill(0, 600, 7);
            slice.read(8400, &memory).expect("over the end");
            let mut expected = bytes[8500..].to_vec();
            expected.resize(600, 0);
            assert_eq!(memory.to_vec(), expected);
            assert!(slice.read_error().is_none());
        }
    }

    #[test]
    fn a_failed_read_is_told_by_every_clone() {
        let mut file = source(&[1; 100], 1);
        let directory = std::fs::File::open("/").expect("a directory");
        file.descriptor = Arc::new(directory.into());
        let slice = FileSlice::new(file, ByteRange::between(0, 100));
        let part = slice.slice(10, 10);
        let error = part.read(0, &MemorySlice::zeroed(10)).expect_err("EISDIR");
        assert_eq!(error.errno(), Errno::EISDIR);
        let told = slice.read_error().expect("a read failed");
        assert_eq!(told.errno(), Errno::EISDIR);
    }

    #[test]
    fn zeroes_are_seen_and_nothing_is_filled() {
        let mut bytes = vec![0; 300_000];
        bytes[299_999] = 1;
        let slice = FileSlice::new(source(&bytes, 1), ByteRange::between(0, 300_000));
        let whole = Payload::from(slice);
        assert!(!whole.is_zero().expect("readable"));
        assert!(whole.slice(0, 299_999).is_zero().expect("readable"));
        assert!(whole.to_memory().expect("readable").to_vec() == bytes);
        let refused = [whole.fill_zero(), whole.copy_in(0, &MemorySlice::zeroed(1))];
        for result in refused {
            assert_eq!(result.expect_err("not to be filled").errno(), Errno::EINVAL);
        }
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn a_slice_of_a_file_cannot_grow() {
        let slice = FileSlice::new(source(&[], 1), ByteRange::between(0, 10));
        slice.slice(5, 6);
    }
}

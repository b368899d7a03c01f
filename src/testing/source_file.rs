//! Files in memory, whose bytes are the payload of a write.

use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::buffer::{FileSlice, MemorySlice, SourceFile};
use crate::error::Result;
use crate::range::ByteRange;

/// A file of these bytes between others, and the slice of it that is them.
///
/// # Errors
/// The system's: no file in memory can be made or written.
pub fn file_slice_of(bytes: &[u8]) -> Result<FileSlice> {
    const BEFORE: u64 = 777;
    let file = memfd_create(c"source", MFdFlags::MFD_CLOEXEC)?;
    let content = MemorySlice::zeroed(bytes.len() + 2 * BEFORE as usize);
    content.fill(0, content.length(), 0x77);
    content.copy_in(BEFORE as usize, bytes);
    let written = content.write_to(&file, 0)?;
    assert_eq!(written, content.length(), "a short write to memory");
    let source = SourceFile {
        descriptor: Arc::new(file),
        alignment: 1,
        direct: false,
        device: 0,
        name: "source".to_owned(),
    };
    let range = ByteRange::between(BEFORE, BEFORE + bytes.len() as u64);
    Ok(FileSlice::new(source, range))
}

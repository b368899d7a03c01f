//! Nodes without children: files, host devices, exports of NBD servers, and a node that stores nothing.
//!
//! A protocol driver turns requests into system calls and nothing else: it gives no meaning to the
//! bytes. It opens what `blockdev` names and never anything that an image names.
//!
//! Invariants:
//! - The errno of a failed system call reaches the caller.
//! - A short transfer is finished here; past the end of a file zeroes are read.
//! - What a node may do to its file is what the bytes locked in the file say (QEMU's protocol).

pub mod file;
pub mod nbd;
pub mod null;

//! The qcow2 format, versions 2 and 3.
//!
//! Not here: opening children (that is `blockdev`'s), subclusters, external data files, encryption,
//! writing to images with internal snapshots.

pub mod check;
pub mod compressed;
pub mod create;
pub mod extension;
pub mod header;
pub mod header_write;
pub mod layout;

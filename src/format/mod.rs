//! Image formats: drivers that give meaning to the bytes of their `file` child.
//!
//! They open nothing: children are handed to them, and a backing name in a header is data.

pub mod qcow2;
pub mod raw;

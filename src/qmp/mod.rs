//! The control socket's protocol: QMP as qemu-storage-daemon speaks it.
//!
//! JSON lives here (and in the configuration) only. [`json`] reads and writes it, [`session`] is one
//! client's conversation as a state machine without I/O or clock, [`schema`] says which commands there
//! are and checks their arguments, [`keyval`] and [`chardev`] read the command line's other notations.

pub mod chardev;
pub mod error;
pub mod json;
pub mod keyval;
pub mod schema;
pub mod session;

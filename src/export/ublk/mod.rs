//! A node as a block device of this machine: `/dev/ublkbN` (ublk).
//!
//! The kernel hands requests to the graph's I/O thread over its own ring; each tag is a task there
//! ([`queue`]). With zero copy a request's pages go to the image files as they are; without it the
//! kernel copies them to and from a buffer per tag. Control commands run on a ring and a thread of
//! their own, removal in a helper process ([`helper_main`]).
//!
//! This is not a block device implementation of its own: every request crosses the export's root
//! edge like any other. Devices are made without user recovery: as long as nothing comes to recover
//! a device, one whose daemon was killed should fail its users, not hang them. Such a dead device is
//! removed when its id is asked for again.
//!
//! Invariants:
//! - Every request is answered exactly once; dropping an unanswered one is a bug that ends the process.
//! - Only features that the kernel granted are acted on.
//! - The device is removed only after every tag has ended and the character device is closed.

mod abi;
mod bring_up;
mod control;
mod descriptors;
mod device;
mod features;
mod identity;
mod mounts;
mod openers;
mod options;
mod pages;
mod parameters;
mod queue;
mod request;
mod subprocess;

pub use device::UblkExport;
pub use mounts::isolate_mounts;
pub use options::{UblkOptions, ZeroCopy};
pub use subprocess::helper_main;

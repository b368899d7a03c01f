//! liveblk: serve chains of disk images as block devices and rearrange them while they are in use.
//!
//! The layers and what each may import stand in `ARCHITECTURE.md`; `tests/layers.rs` holds them.

pub mod block;
pub mod blockdev;
pub mod buffer;
pub mod cli;
pub mod daemon;
pub mod error;
pub mod export;
pub mod filter;
pub mod format;
pub mod job;
pub mod nbd;
pub mod protocol;
pub mod qmp;
pub mod range;
pub mod runtime;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

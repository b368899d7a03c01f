//! What a node is and how nodes are joined.
//!
//! A [`Node`] is a driver with a name. Nodes are joined by [`Child`] edges to a [`Graph`]; all I/O
//! between nodes crosses a `Child`, where range, alignment, permission and in-flight count are dealt
//! with once, so that a [`Driver`] may trust its arguments. This module knows no format, no file and
//! no protocol; it opens nothing.
//!
//! Invariants:
//! - Everything here belongs to one I/O thread and is not `Send`.
//! - The graph changes only inside a drained section (see [`Graph::drain`]).
//! - What changes a node's content is in its dirty bitmaps when it was answered, and marked in what is
//!   stored of them before it begins.
//! - An edge never has permissions that another edge to the same node does not share.

mod bitmap;
mod bitmap_store;
mod bitmaps;
mod child;
mod debug_event;
mod delivery;
mod dirty_bitmap;
mod drain;
mod driver;
mod graph;
mod kept_regions;
mod limits;
mod node;
mod occupation;
mod padding;
mod permission;
mod permission_update;
mod range_lock;
mod shelf;
mod splice;
mod status;
mod transaction;

#[cfg(test)]
mod tests;

pub use bitmap::{Bitmap, BitmapFlags, BusyBitmap, FrozenBitmap};
pub use bitmap_store::BitmapStore;
pub use bitmaps::Bitmaps;
pub use child::{Child, Parent, Passage, Role};
pub use debug_event::{DEBUG_EVENTS, DebugEvent};
pub use dirty_bitmap::DirtyBitmap;
pub use drain::DrainedSection;
pub use driver::{
    Driver, Forward, InFlight, IoFuture, Transfer, TransferGuard, TransferKind, TruncateOptions,
    WriteFlags, ZeroFlags,
};
pub use graph::{BlockEvent, Graph, NodeSpec};
pub use kept_regions::KeptRegions;
pub use limits::Limits;
pub use node::{DetectZeroes, DiscardMode, Node, NodeOptions, NodeStatistics, is_well_formed};
pub use occupation::{Content, Occupation};
pub use permission::{Permission, Permissions};
pub use range_lock::{LockMode, RangeGuard, RangeLock};
pub use shelf::Shelf;
pub use status::{ChainStatus, Extent, ExtentKind, status_above};
pub use transaction::{Action, Stage};

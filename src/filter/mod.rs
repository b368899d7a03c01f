//! Filters: nodes that change the traffic of one child and have no content of their own.
//!
//! Users put them in by `blockdev-add` and `blockdev-reopen`, jobs by themselves. They open nothing:
//! children are handed to them. Whoever walks a chain looks through them
//! ([`Node::without_filters`](crate::block::Node::without_filters)).
//!
//! Invariants:
//! - What is read through a filter is what its child has.
//! - Nothing waits in a filter that a drained section could not wait for.

/// Methods of a [`Driver`](crate::block::Driver) that a filter hands to the child in this field as they are.
macro_rules! hand_on {
    ($child:ident: $($method:ident),+) => {
        $(hand_on!(@$method $child);)+

        fn is_filter(&self) -> bool {
            true
        }
    };
    (@size $child:ident) => {
        fn size(&self) -> u64 {
            self.$child.node().size()
        }
    };
    (@limits $child:ident) => {
        fn limits(&self) -> Limits {
            $crate::filter::passed_limits(&self.$child)
        }
    };
    (@flush $child:ident) => {
        fn flush(&self) -> IoFuture<'_, ()> {
            Box::pin(self.$child.flush())
        }
    };
    (@block_status $child:ident) => {
        fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
            Box::pin(self.$child.block_status(range))
        }
    };
    (@discard $child:ident) => {
        fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
            Box::pin(self.$child.discard(range))
        }
    };
    (@truncate $child:ident) => {
        fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
            Box::pin(self.$child.truncate(size, options))
        }
    };
}

mod blkdebug;
mod commit_top;
mod copy_before_write;
mod copy_on_read;
mod mirror_top;
mod preallocate;
mod snapshot_access;
mod throttle;

use crate::block::{Child, Limits};

pub use blkdebug::{Blkdebug, BlkdebugOptions, InjectError, IoTypes, SetState};
pub use commit_top::CommitTop;
pub use copy_before_write::{CbwOptions, CopyBeforeWrite, OnCbwError, Snapshot, SnapshotEvent};
pub use copy_on_read::{CopyOnRead, GuestReads};
pub use mirror_top::{CopyMode, MirrorNews, MirrorOptions, MirrorSink, MirrorTop, Place};
pub use preallocate::{Preallocate, PreallocateOptions};
pub use snapshot_access::SnapshotAccess;
pub use throttle::{Rate, Throttle, ThrottleGroup, ThrottleGroups, ThrottleLimits};

/// The limits of a filter that hands requests on as they are: those of its child, which does the padding.
fn passed_limits(child: &Child) -> Limits {
    Limits {
        request_alignment: 1,
        memory_alignment: 1,
        ..child.node().driver().limits()
    }
}

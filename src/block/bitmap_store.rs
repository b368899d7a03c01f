//! What a driver that stores bitmaps with its image does for them.

use std::rc::Rc;

use crate::error::Result;
use crate::range::ByteRange;

use super::{Bitmaps, IoFuture};

/// Keeps the persistent bitmaps of a node. What is stored says at every moment at least what has changed:
/// a bitmap may be stored with parts that are clean, never without one that is dirty.
pub trait BitmapStore {
    /// The bitmaps of the node, stored ones and others.
    fn bitmaps(&self) -> &Rc<Bitmaps>;

    /// Whether one of this name and granularity could be stored, too.
    ///
    /// # Errors
    /// The reason, in QEMU's words.
    fn check_new(&self, name: &str, granularity: u64) -> Result<()>;

    /// Bitmaps came or went, got other bits or other states: stores them as they are. Durable when answered.
    /// Does nothing for an image that is not written.
    fn update(&self) -> IoFuture<'_, ()>;

    /// The range is about to be changed: it is marked in what is stored, durably, when this is answered.
    fn mark(&self, range: ByteRange) -> IoFuture<'_, ()>;
}

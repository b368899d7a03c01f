//! Block status: what a range is, in one layer or in a chain.

use std::rc::Rc;

use crate::error::Result;
use crate::range::ByteRange;

use super::{Child, Node, Role};

/// What an extent is in the layer that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored here as data.
    Data {
        /// Offset in the `file` child, where it is there as it is read.
        host_offset: Option<u64>,
        /// Stored compressed.
        compressed: bool,
    },
    /// Reads as zeroes, and this layer says so. `allocated`: space is kept for it at the offset.
    Zero {
        /// Offset of the kept space in the `file` child.
        host_offset: Option<u64>,
    },
    /// This layer says nothing: the backing file decides; zeroes where there is none.
    Unallocated,
}

/// A range of equal status from the start of the range that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; at least 1 and never more than were asked for.
    pub length: u64,
    /// What they are.
    pub kind: ExtentKind,
}

impl Extent {
    /// Data stored as it is at `host_offset`.
    pub fn data(length: u64, host_offset: u64) -> Extent {
        let kind = ExtentKind::Data {
            host_offset: Some(host_offset),
            compressed: false,
        };
        Extent { length, kind }
    }

    /// Zeroes without space kept for them.
    pub fn zero(length: u64) -> Extent {
        Extent {
            length,
            kind: ExtentKind::Zero { host_offset: None },
        }
    }

    /// Nothing in this layer.
    pub fn unallocated(length: u64) -> Extent {
        Extent {
            length,
            kind: ExtentKind::Unallocated,
        }
    }

    /// This layer decides what is read.
    pub fn is_allocated(&self) -> bool {
        self.kind != ExtentKind::Unallocated
    }
}

impl Child {
    /// The status of the start of the range seen through the node below and its backing chain, with
    /// the depth of the layer that decides; see [`status_above`].
    ///
    /// # Errors
    /// Outside the node `EIO`; else what a driver says.
    pub async fn status_through(&self, range: ByteRange) -> Result<(Extent, usize)> {
        let _passage = self.enter().await;
        let node = self.node();
        self.check_inside(&node, range.start(), range.length())?;
        status_above(&node, None, range).await
    }
}

/// The status of the start of `range` seen through `top` and the layers below it, not including
/// `base`; with the depth of the layer that decides (1: `top` itself, 0: none does).
pub async fn status_above(
    top: &Rc<Node>,
    base: Option<&Rc<Node>>,
    range: ByteRange,
) -> Result<(Extent, usize)> {
    let mut node = top.clone();
    let mut range = range;
    let mut depth = 1;
    loop {
        let extent = status_within(&node, range).await?;
        if extent.is_allocated() {
            return Ok((extent, depth));
        }
        range = ByteRange::between(range.start(), range.start() + extent.length);
        let below = node.child(Role::Backing).map(|child| child.node());
        match below {
            Some(below) if !base.is_some_and(|base| Rc::ptr_eq(base, &below)) => node = below,
            _ => return Ok((extent, 0)),
        }
        depth += 1;
    }
}

/// The status in one layer; past its end a layer is zeroes.
async fn status_within(node: &Rc<Node>, range: ByteRange) -> Result<Extent> {
    let size = node.size();
    if range.start() >= size {
        return Ok(Extent::zero(range.length()));
    }
    let inside = ByteRange::between(range.start(), range.end().min(size));
    node.driver().block_status(inside).await
}

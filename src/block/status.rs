//! Block status: what a range is, in one layer or in a chain.

use std::rc::Rc;

use crate::error::Result;
use crate::range::ByteRange;

use super::{Child, Node};

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

/// What a range is, seen through a node and the layers below it.
pub struct ChainStatus {
    /// The start of the range.
    pub extent: Extent,
    /// Number of the layer that decides: 1 is the top one; 0: none does. Filters are no layers.
    pub depth: usize,
    /// The node that decides.
    pub node: Option<Rc<Node>>,
    /// A filter lies between the top and the node that decides, or is the top itself.
    pub filtered: bool,
}

impl Child {
    /// The status of the start of the range seen through the node below and its backing chain, not
    /// including `base`; see [`status_above`].
    ///
    /// # Errors
    /// Outside the node `EIO`; else what a driver says.
    pub async fn status_through(
        &self,
        range: ByteRange,
        base: Option<&Rc<Node>>,
    ) -> Result<ChainStatus> {
        let _passage = self.enter().await;
        let node = self.node();
        self.check_inside(&node, range.start(), range.length())?;
        status_above(&node, base, range).await
    }
}

/// The status of the start of `range` seen through `top` and the layers below it, not including
/// `base`. Filters are looked through.
pub async fn status_above(
    top: &Rc<Node>,
    base: Option<&Rc<Node>>,
    range: ByteRange,
) -> Result<ChainStatus> {
    let is_base = |node: &Rc<Node>| base.is_some_and(|base| Rc::ptr_eq(base, node));
    let mut extent = Extent::unallocated(range.length());
    let (mut depth, mut filtered) = (0, false);
    let mut next = Some(top.clone());
    while let Some(node) = next.take_if(|node| !is_base(node)) {
        if node.driver().is_filter() {
            filtered = true;
            next = node.below();
            continue;
        }
        depth += 1;
        let rest = ByteRange::between(range.start(), range.start() + extent.length);
        extent = status_within(&node, rest).await?;
        if extent.is_allocated() {
            return Ok(ChainStatus {
                extent,
                depth,
                node: Some(node),
                filtered,
            });
        }
        next = node.below();
    }
    Ok(ChainStatus {
        extent,
        depth: 0,
        node: None,
        filtered,
    })
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

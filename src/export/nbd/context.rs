//! What an export tells about its blocks: metadata contexts.

use std::rc::Rc;

use crate::block::{
    Bitmap, BitmapFlags, BusyBitmap, ChainStatus, Child, Extent, ExtentKind, Graph, Node,
};
use crate::error::{Error, Result};
use crate::nbd::{ALLOCATION_CONTEXT, ExtentList, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use crate::range::ByteRange;

/// Name of the context that tells how deep in the backing chain data lies.
const ALLOCATION_DEPTH_CONTEXT: &str = "qemu:allocation-depth";

/// Before the name of a dirty bitmap, in the name of its context.
const DIRTY_BITMAP_CONTEXT: &str = "qemu:dirty-bitmap:";

/// A dirty bitmap that an export is to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapReference {
    /// The node that has it; where none is given, the first from the exported one down that has one of that name.
    pub node: Option<String>,
    /// Its name.
    pub name: String,
}

/// A metadata context of an export.
pub(super) enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME`; nobody else uses the bitmap meanwhile.
    DirtyBitmap(BusyBitmap),
}

impl Context {
    /// The full name.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Allocation => ALLOCATION_CONTEXT.into(),
            Self::AllocationDepth => ALLOCATION_DEPTH_CONTEXT.into(),
            Self::DirtyBitmap(busy) => format!("{DIRTY_BITMAP_CONTEXT}{}", busy.bitmap().name()),
        }
    }

    /// The status of the range from its start on; of its first extent at least, of more where not only `one` is wanted.
    ///
    /// # Errors
    ///
    /// The node's status cannot be read.
    pub(super) async fn describe(
        &self,
        root: &Child,
        range: ByteRange,
        one: bool,
    ) -> Result<ExtentList> {
        let mut list = ExtentList::new();
        let mut offset = range.start();
        while offset < range.end() && !list.is_full() && !(one && list.length() > 0) {
            let rest = ByteRange::between(offset, range.end());
            let (length, flags) = match self {
                Self::Allocation => {
                    let ChainStatus { extent, .. } = root.status_through(rest, None).await?;
                    (extent.length, allocation(&extent))
                }
                Self::AllocationDepth => {
                    let ChainStatus { extent, depth, .. } = root.status_through(rest, None).await?;
                    (extent.length, u32::try_from(depth).unwrap_or(u32::MAX))
                }
                Self::DirtyBitmap(busy) => dirtiness(busy.bitmap(), rest),
            };
            list.push(length, flags);
            offset += length;
        }
        Ok(list)
    }
}

/// State in `base:allocation`, of an extent seen through the whole chain.
fn allocation(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data { .. } => 0,
        ExtentKind::Zero {
            host_offset: Some(_),
        } => STATE_ZERO,
        ExtentKind::Zero { host_offset: None } | ExtentKind::Unallocated => STATE_HOLE | STATE_ZERO,
    }
}

/// Length and state of the first bytes of the range. What a bitmap of a smaller disk does not know may have changed.
fn dirtiness(bitmap: &Bitmap, range: ByteRange) -> (u64, u32) {
    bitmap.with_bits(|bits| {
        let known = range.end().min(bits.size());
        if range.start() >= known {
            return (range.length(), STATE_DIRTY);
        }
        let inside = ByteRange::between(range.start(), known);
        let (flags, end) = match bits.first_dirty(inside) {
            Some(first) if first == inside.start() => (STATE_DIRTY, bits.first_clean(inside)),
            dirty => (0, dirty),
        };
        (end.unwrap_or(known) - range.start(), flags)
    })
}

/// Occupies the bitmaps that these references name, none twice.
///
/// # Errors
///
/// In QEMU's words: there is no such node or bitmap, somebody works with it, it says nothing, or it goes on recording while the
/// export is read-only and so is believed to stay as it is. Two different ones have the same name, as contexts have none else.
pub(super) fn occupy_bitmaps(
    graph: &Graph,
    exported: &Rc<Node>,
    writable: bool,
    references: &[BitmapReference],
) -> Result<Vec<BusyBitmap>> {
    let mut occupied: Vec<BusyBitmap> = Vec::new();
    for reference in references {
        let bitmap = find_bitmap(graph, exported, writable, reference)?;
        if occupied
            .iter()
            .any(|busy| Rc::ptr_eq(busy.bitmap(), &bitmap))
        {
            continue;
        }
        let busy = bitmap.occupy()?;
        let name = bitmap.name();
        if occupied.iter().any(|other| other.bitmap().name() == name) {
            let text = format!("Two bitmaps are called '{name}', as is what clients ask for");
            return Err(Error::refused(text));
        }
        occupied.push(busy);
    }
    Ok(occupied)
}

fn find_bitmap(
    graph: &Graph,
    exported: &Rc<Node>,
    writable: bool,
    reference: &BitmapReference,
) -> Result<Rc<Bitmap>> {
    let name = reference.name.as_str();
    if let Some(node) = &reference.node {
        return graph.find_bitmap(node, name).map(|(_, bitmap)| bitmap);
    }
    let chain = std::iter::successors(Some(exported.clone()), |node| node.below());
    let mut all = chain.filter_map(|node| Some((node.bitmaps().find(name)?, node)));
    let Some((bitmap, node)) = all.next() else {
        return Err(Error::refused(format!("Bitmap '{name}' is not found")));
    };
    if !writable && !node.options().read_only && bitmap.is(BitmapFlags::ENABLED) {
        let text = format!("Enabled bitmap '{name}' incompatible with readonly export");
        return Err(Error::refused(text));
    }
    Ok(bitmap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::DirtyBitmap;

    const PART: u64 = 4096;

    /// (start, state) of all that is told of the range.
    fn told(bitmap: &Bitmap, range: ByteRange) -> Vec<(u64, u32)> {
        let (mut offset, mut told) = (range.start(), Vec::new());
        while offset < range.end() {
            let (length, flags) = dirtiness(bitmap, ByteRange::between(offset, range.end()));
            told.push((offset, flags));
            offset += length;
        }
        assert_eq!(offset, range.end());
        told
    }

    #[test]
    fn a_bitmap_is_told_part_by_part() {
        let mut bits = DirtyBitmap::new(10 * PART, PART);
        bits.set(ByteRange::between(2 * PART, 4 * PART));
        bits.set(ByteRange::between(9 * PART, 10 * PART));
        let bitmap = Bitmap::new("b", BitmapFlags::empty(), bits);
        let all = ByteRange::between(0, 10 * PART);
        let expected = [
            (0, 0),
            (2 * PART, STATE_DIRTY),
            (4 * PART, 0),
            (9 * PART, STATE_DIRTY),
        ];
        assert_eq!(told(&bitmap, all), expected);
        let part = ByteRange::between(3 * PART + 1, 8 * PART);
        assert_eq!(
            told(&bitmap, part),
            [(3 * PART + 1, STATE_DIRTY), (4 * PART, 0)]
        );
    }

    #[test]
    fn what_a_bitmap_does_not_know_is_dirty() {
        let bitmap = Bitmap::new(
            "b",
            BitmapFlags::empty(),
            DirtyBitmap::new(PART + 512, PART),
        );
        let range = ByteRange::between(0, 3 * PART);
        assert_eq!(told(&bitmap, range), [(0, 0), (PART + 512, STATE_DIRTY)]);
    }
}

//! What comes next of a copy, and how: cut where the target's clusters end.

use std::rc::Rc;

use crate::block::{ChainStatus, Child, ExtentKind, Node, Role};
use crate::buffer::FileSlice;
use crate::error::Result;
use crate::range::{ByteRange, align_down, align_up};

/// Status answers that are put together to one step.
const MOST_JOINED: usize = 64;

/// The first part of a range, and how it gets across.
pub(super) struct Step {
    pub(super) range: ByteRange,
    pub(super) way: Way,
}

/// How a part gets across.
pub(super) enum Way {
    /// It is there: the source reads it through the target.
    Shared,
    /// As zeroes.
    Zeroes,
    /// As a part of the file it lies in.
    File(FileSlice),
    /// By a read and a write.
    Memory,
}

/// What a copy of a range goes by.
pub(super) struct Planner<'a> {
    pub(super) from: &'a Rc<Child>,
    /// Below it source and target have the same.
    pub(super) target: &'a Rc<Node>,
    /// The target is in the source's chain.
    pub(super) overlays: bool,
    /// Parts of the target that are cheap to write whole; a power of two.
    pub(super) unit: u64,
    /// Longest step through memory; not below the unit.
    pub(super) most: u64,
    /// Who would write parts of files.
    pub(super) file_writer: Option<Rc<Node>>,
}

/// A range of which the source says one thing.
struct Stretch {
    end: u64,
    way: Way,
}

impl Planner<'_> {
    /// The first step of a range that is not empty and lies within the source.
    pub(super) async fn step(&self, range: ByteRange) -> Result<Step> {
        let first = self.stretch(range).await?;
        let way_end = self.whole_end(&first, range);
        if way_end > range.start() {
            let covered = ByteRange::between(range.start(), way_end);
            return Ok(Step {
                way: cut(first.way, covered.length()),
                range: covered,
            });
        }
        let end = self.memory_end(first, range).await?;
        Ok(Step {
            range: ByteRange::between(range.start(), end),
            way: Way::Memory,
        })
    }

    /// Up to where a stretch from the start of the range goes across in its own way: whole units of
    /// the target, or the start of the range where there are none.
    fn whole_end(&self, stretch: &Stretch, range: ByteRange) -> u64 {
        let start = range.start();
        let whole = align_down(stretch.end, self.unit);
        let is_last = stretch.end == range.end();
        match stretch.way {
            Way::Memory => start,
            Way::Shared | Way::Zeroes if is_last => stretch.end,
            Way::Shared | Way::Zeroes => whole.max(start),
            // Part of a cluster is merged with what is around it, in memory.
            Way::File(_) if start & (self.unit - 1) == 0 => whole.max(start),
            Way::File(_) => start,
        }
    }

    /// The end of a step through memory: where units begin that have a way of their own.
    async fn memory_end(&self, first: Stretch, range: ByteRange) -> Result<u64> {
        let limit = align_down(range.start(), self.unit) + align_down(self.most, self.unit);
        let limit = limit.min(range.end());
        let round = |end: u64| align_up(end, self.unit).map_or(limit, |end| end.min(limit));
        if !matches!(first.way, Way::Memory) {
            return Ok(round(range.start() + 1));
        }
        let mut end = round(first.end);
        while end < limit {
            let rest = ByteRange::between(end, limit);
            let next = self.stretch(rest).await?;
            if self.whole_end(&next, rest) > end {
                break;
            }
            end = round(next.end);
        }
        Ok(end)
    }

    /// What the start of a range is, with what follows of the same sort.
    async fn stretch(&self, range: ByteRange) -> Result<Stretch> {
        let status = self.status(range).await?;
        let mut end = range.start() + status.extent.length;
        let way = self.way(&status);
        if matches!(way, Way::File(_)) {
            return Ok(Stretch { end, way });
        }
        for _ in 1..MOST_JOINED {
            if end == range.end() {
                break;
            }
            let status = self.status(ByteRange::between(end, range.end())).await?;
            let next = self.way(&status);
            if std::mem::discriminant(&next) != std::mem::discriminant(&way) {
                break;
            }
            end += status.extent.length;
        }
        Ok(Stretch { end, way })
    }

    async fn status(&self, range: ByteRange) -> Result<ChainStatus> {
        self.from.status_through(range, Some(self.target)).await
    }

    fn way(&self, status: &ChainStatus) -> Way {
        match status.extent.kind {
            ExtentKind::Unallocated if self.overlays => Way::Shared,
            ExtentKind::Unallocated | ExtentKind::Zero { .. } => Way::Zeroes,
            ExtentKind::Data { .. } => match self.slice(status) {
                Some(slice) => Way::File(slice),
                None => Way::Memory,
            },
        }
    }

    /// The file that has the extent as it is read; a filter on the way wants reads to cross it.
    fn slice(&self, status: &ChainStatus) -> Option<FileSlice> {
        let ExtentKind::Data {
            host_offset: Some(offset),
            compressed: false,
        } = status.extent.kind
        else {
            return None;
        };
        if status.filtered {
            return None;
        }
        let writer = self.file_writer.as_ref()?.driver();
        let file = status.node.as_ref()?.child(Role::File)?.node();
        let range = ByteRange::new(offset, status.extent.length)?;
        let slice = file.driver().file_slice(range)?;
        writer.writes_file(&slice).then_some(slice)
    }
}

fn cut(way: Way, length: u64) -> Way {
    match way {
        Way::File(slice) => Way::File(slice.slice(0, length)),
        other => other,
    }
}

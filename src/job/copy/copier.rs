//! Making a range of one node equal to what is read through another.

use std::fmt;
use std::rc::Rc;

use crate::block::{Child, DetectZeroes, Node, Role, WriteFlags, ZeroFlags};
use crate::buffer::{BufferPool, FileSlice, MEMORY_ALIGNMENT, MemorySlice};
use crate::error::Error;
use crate::range::ByteRange;

use super::plan::{Planner, Step, Way};

/// How a [`Copier`] copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// Bytes that one step moves through memory at most; rounded up to a page, at least a page.
    pub buffer_length: usize,
    /// Zeroes may take space away from the target.
    pub unmap: bool,
    /// Data may be taken from the file it lies in. Only where nobody changes the source meanwhile:
    /// a cluster that moves while it is copied gives the bytes of another.
    pub file_slices: bool,
    /// Data is stored compressed, which it is not as part of a file. The buffer has room for a cluster of
    /// the target.
    pub compress: bool,
}

impl Default for CopyOptions {
    fn default() -> CopyOptions {
        CopyOptions {
            buffer_length: 1 << 20,
            unmap: true,
            file_slices: true,
            compress: false,
        }
    }
}

/// Why a copy failed, and on which side.
#[derive(Debug)]
pub enum CopyError {
    /// The source could not be read, or its status not be told.
    Read(Error),
    /// The target could not be written.
    Write(Error),
}

impl CopyError {
    /// What happened, whichever side it was.
    pub fn error(&self) -> &Error {
        match self {
            CopyError::Read(error) | CopyError::Write(error) => error,
        }
    }

    /// The error as one of reading: clients of a stream know no other.
    pub fn into_read(self) -> CopyError {
        match self {
            CopyError::Read(error) | CopyError::Write(error) => CopyError::Read(error),
        }
    }

    /// It was the source.
    pub fn is_read(&self) -> bool {
        matches!(self, CopyError::Read(_))
    }
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error().fmt(f)
    }
}

impl std::error::Error for CopyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.error())
    }
}

/// Spare buffers that are kept.
const MOST_SPARE: usize = 16;

/// Copies ranges between nodes. Copies of different ranges may run side by side.
pub struct Copier {
    options: CopyOptions,
    buffers: BufferPool,
}

impl Copier {
    /// A copier with these options.
    pub fn new(options: CopyOptions) -> Copier {
        let length = options.buffer_length.max(1);
        let length = length.next_multiple_of(MEMORY_ALIGNMENT);
        Copier {
            buffers: BufferPool::new(length, MOST_SPARE),
            options: CopyOptions {
                buffer_length: length,
                ..options
            },
        }
    }

    /// Makes the bytes of `range` in the node of `to` equal to what is read through `from`: its node and
    /// all layers below. Past the source's end there are zeroes. What the source itself reads through the
    /// target's node (a commit) is left alone. Nothing is flushed.
    ///
    /// The steps of a range follow one another; each waits at the gates of root edges by itself. The
    /// future must be run to its end, like those of the requests it makes.
    ///
    /// # Errors
    /// What the edges say. Some of the range may have been copied.
    pub async fn copy(
        &self,
        from: &Rc<Child>,
        to: &Rc<Child>,
        range: ByteRange,
    ) -> Result<(), CopyError> {
        let mut rest = range;
        while !rest.is_empty() {
            let step = self.plan(from, to, rest).await.map_err(CopyError::Read)?;
            rest = ByteRange::between(step.range.end(), range.end());
            self.carry_out(from, to, step).await?;
        }
        Ok(())
    }

    /// The next step, by the graph as it is now: it may change between two.
    async fn plan(&self, from: &Rc<Child>, to: &Rc<Child>, rest: ByteRange) -> Result<Step, Error> {
        let source = from.node();
        let end = source.size().min(rest.end());
        if end <= rest.start() {
            return Ok(Step {
                range: rest,
                way: Way::Zeroes,
            });
        }
        let target = to.node().without_filters();
        let most = self.options.buffer_length as u64;
        let planner = Planner {
            from,
            target: &target,
            overlays: is_below(&source, &target),
            unit: unit_of(&target).min(largest_power(most)),
            most,
            file_writer: match self.options.file_slices && !self.options.compress {
                true => file_writer(&target),
                false => None,
            },
        };
        planner.step(ByteRange::between(rest.start(), end)).await
    }

    async fn carry_out(
        &self,
        from: &Rc<Child>,
        to: &Rc<Child>,
        step: Step,
    ) -> Result<(), CopyError> {
        let Step { range, way } = step;
        match way {
            Way::Shared => Ok(()),
            Way::Zeroes => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, self.options.unmap);
                let zeroed = to.write_zeroes(range, flags).await;
                zeroed.map_err(CopyError::Write)
            }
            Way::File(slice) => write_file(to, range, slice).await,
            Way::Memory => {
                let buffer = self.buffers.take().slice(0, range.length() as usize);
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::COMPRESSED, self.options.compress);
                move_bytes(from, to, range.start(), buffer, flags).await
            }
        }
    }
}

/// The write reads the source too: the slice tells if that was what failed.
async fn write_file(to: &Rc<Child>, range: ByteRange, slice: FileSlice) -> Result<(), CopyError> {
    let empty = WriteFlags::empty();
    let written = to.write(range.start(), slice.clone().into(), empty).await;
    written.map_err(|error| match slice.read_error() {
        Some(error) => CopyError::Read(error),
        None => CopyError::Write(error),
    })
}

async fn move_bytes(
    from: &Rc<Child>,
    to: &Rc<Child>,
    offset: u64,
    buffer: MemorySlice,
    flags: WriteFlags,
) -> Result<(), CopyError> {
    let read = from.read(offset, buffer.clone().into()).await;
    read.map_err(CopyError::Read)?;
    let written = to.write(offset, buffer.into(), flags).await;
    written.map_err(CopyError::Write)
}

/// Bytes of the target that are cheap to write whole.
fn unit_of(target: &Rc<Node>) -> u64 {
    let limits = target.driver().limits();
    u64::from(limits.optimal_transfer.max(limits.request_alignment))
}

/// Who writes what is written to the target, if parts of files get through to it. A node on the way
/// that looks for zeroes would read them on this thread.
fn file_writer(target: &Rc<Node>) -> Option<Rc<Node>> {
    let mut node = target.clone();
    while node.options().detect_zeroes == DetectZeroes::Off {
        match node.child(Role::File) {
            Some(file) => node = file.node(),
            None => return Some(node),
        }
    }
    None
}

/// The largest power of two not above `length`, which is not 0.
fn largest_power(length: u64) -> u64 {
    1 << length.ilog2()
}

/// `node` is in the chain of `top`, or the child of a filter there.
fn is_below(top: &Rc<Node>, node: &Rc<Node>) -> bool {
    let mut next = Some(top.clone());
    while let Some(layer) = next {
        if Rc::ptr_eq(&layer, node) {
            return true;
        }
        next = layer.below();
    }
    false
}

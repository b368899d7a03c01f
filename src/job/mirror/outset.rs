//! What is to be copied when a job begins to follow.

use std::rc::Rc;

use super::Follower;
use crate::block::{Node, ZeroFlags, status_above};
use crate::error::{Error, Result};
use crate::job::LocalFuture;
use crate::job::copy::CopyError;
use crate::job::pieces::Pieces;
use crate::range::ByteRange;

/// Bytes of the target that one request zeroes at most.
const ZEROED: u64 = 256 << 20;

/// What is to be copied at first.
pub(in crate::job) enum Outset {
    /// What the layers above this one have; without one, what any layer has.
    Allocated(Option<Rc<Node>>),
    /// As `Allocated(None)`, after the target was made zeroes.
    Zeroed,
    /// All there is.
    Everything,
    /// Nothing: only what is written from now on.
    Nothing,
}

impl Follower {
    /// Gets the target ready and marks what is to be copied. Meanwhile users' writes are only marked.
    pub(super) async fn begin(self: &Rc<Self>) -> Result<()> {
        self.check_sizes()?;
        match &self.course.outset {
            Outset::Nothing => Ok(()),
            Outset::Everything => {
                self.mirror().mark(self.whole());
                Ok(())
            }
            Outset::Allocated(base) => self.mark_allocated(base.as_ref()).await,
            Outset::Zeroed => {
                let zeroing = Zeroing {
                    follower: self.clone(),
                    cursor: 0.into(),
                };
                self.work_off(Rc::new(zeroing)).await?;
                self.mark_allocated(None).await
            }
        }
    }

    fn check_sizes(&self) -> Result<()> {
        let course = &self.course;
        if course.same_size && course.source.size() != course.target.size() {
            let message = "Source and target image have different sizes";
            return Err(Error::refused(message));
        }
        Ok(())
    }

    /// What a layer above the base has is to be copied.
    async fn mark_allocated(&self, base: Option<&Rc<Node>>) -> Result<()> {
        let source = &self.course.source;
        let size = source.size();
        let mut start = 0;
        while start < size && !self.job.is_cancelled() {
            let _passage = self.gate.enter().await;
            let rest = ByteRange::between(start, size);
            let status = status_above(source, base, rest).await?;
            let next = start + status.extent.length;
            if status.depth > 0 {
                self.mirror().mark(ByteRange::between(start, next));
            }
            start = next;
        }
        Ok(())
    }
}

/// The target is made zeroes.
struct Zeroing {
    follower: Rc<Follower>,
    cursor: std::cell::Cell<u64>,
}

impl Zeroing {
    async fn zero(&self, piece: ByteRange) -> Result<(), CopyError> {
        let _passage = self.follower.gate.enter().await;
        let target = self.follower.mirror().target();
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, self.follower.course.unmap);
        let zeroed = target.write_zeroes(piece, flags).await;
        zeroed.map_err(CopyError::Write)
    }
}

impl Pieces for Zeroing {
    fn next(&self) -> LocalFuture<'_, Option<ByteRange>> {
        Box::pin(async {
            let whole = self.follower.whole();
            let start = self.cursor.get();
            let end = whole.end().min(start + ZEROED);
            self.cursor.set(end);
            (start < end).then(|| ByteRange::between(start, end))
        })
    }

    fn carry_out(&self, piece: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        Box::pin(self.zero(piece))
    }

    fn ended(&self, _piece: ByteRange) {}

    fn retries(&self) -> bool {
        true
    }

    /// Nothing is copied.
    fn cost(&self, _piece: ByteRange) -> u64 {
        0
    }
}

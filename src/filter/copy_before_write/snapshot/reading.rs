//! Reading what a disk held at the moment of a snapshot.

use std::rc::Rc;

use nix::errno::Errno;

use super::Snapshot;
use crate::block::{Child, Extent, ExtentKind, LockMode, RangeGuard};
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// Where a part of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Live,
    Saved,
}

impl Snapshot {
    /// Fills the payload with what the disk held at `offset`.
    ///
    /// # Errors
    /// `EACCES`: the snapshot does not have all of it. What the edges say.
    pub(crate) async fn read(&self, offset: u64, payload: Payload) -> Result<()> {
        let end = offset + payload.length() as u64;
        let mut start = offset;
        while start < end {
            let (place, part, _held) = self.hold_part(ByteRange::between(start, end)).await?;
            let at = (start - offset) as usize;
            let into = payload.slice(at, part.length() as usize);
            self.edge(place).read(start, into).await?;
            self.check_place(place)?;
            start = part.end();
        }
        Ok(())
    }

    /// What the first extent of the range was: data or zeroes.
    ///
    /// # Errors
    /// As [`Snapshot::read`].
    pub(crate) async fn block_status(&self, range: ByteRange) -> Result<Extent> {
        let (place, part, _held) = self.hold_part(range).await?;
        let mut extent = self.edge(place).status_through(part, None).await?.extent;
        self.check_place(place)?;
        extent.kind = match extent.kind {
            ExtentKind::Data { compressed, .. } => ExtentKind::Data {
                host_offset: None,
                compressed,
            },
            _ => ExtentKind::Zero { host_offset: None },
        };
        Ok(extent)
    }

    /// Nobody wants the clusters that lie in the range any more: they are not saved, and what was saved of
    /// them is discarded in the target.
    ///
    /// # Errors
    /// As [`Snapshot::read`]; what the target says.
    pub(crate) async fn discard(&self, range: ByteRange) -> Result<()> {
        let end = match range.end() >= self.file.node().size() {
            true => self.clusters(range).end(),
            false => range.end(),
        };
        let clusters = ByteRange::between(range.start(), end).align_inward(self.cluster_size());
        let Some(clusters) = clusters else {
            return Ok(());
        };
        let clusters = ByteRange::between(clusters.start(), clusters.end().min(range.end()));
        let _held = self.hold(clusters).await.map_err(|_| gone())?;
        self.give_up(clusters);
        self.target.discard(clusters).await
    }

    fn edge(&self, place: Place) -> &Rc<Child> {
        match place {
            Place::Live => &self.file,
            Place::Saved => &self.target,
        }
    }

    /// The first part of a range that is in one place, where it stays while the guard lives.
    async fn hold_part(&self, range: ByteRange) -> Result<(Place, ByteRange, RangeGuard)> {
        loop {
            let (_, part) = self.part(range)?;
            let held = self.lock_clusters(part, LockMode::Shared).await;
            let held = held.map_err(|_| gone())?;
            let (place, part) = self.part(part)?;
            if !part.is_empty() {
                return Ok((place, part, held));
            }
        }
    }

    fn part(&self, range: ByteRange) -> Result<(Place, ByteRange)> {
        if self.is_broken() {
            return Err(gone());
        }
        for (place, bitmap) in [(Place::Saved, &self.saved), (Place::Live, &self.live)] {
            let end = bitmap.borrow().first_clean(range).unwrap_or(range.end());
            if end > range.start() {
                return Ok((place, ByteRange::between(range.start(), end)));
            }
        }
        Err(gone())
    }

    /// After a snapshot has come to an end, the disk may have changed while it was read.
    fn check_place(&self, place: Place) -> Result<()> {
        match place {
            Place::Live if self.is_broken() => Err(gone()),
            _ => Ok(()),
        }
    }
}

fn gone() -> Error {
    Error::from_errno(Errno::EACCES, "the snapshot does not have this any more")
}

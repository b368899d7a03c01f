//! A stretch of a disk, worked through from its start to its end.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::copy::{CopyError, Pace};
use super::pieces::Pieces;
use super::{Job, LocalFuture};
use crate::error::Result;
use crate::range::ByteRange;

/// Bytes in a piece at most where a speed limit pays for each.
const LIMITED_PIECE: u64 = 512 << 10;

/// Bytes that one look goes over at most: it holds up the thread that serves the guest.
const MOST_LOOKED_AT: u64 = 256 << 20;

/// What a job does to each part of the stretch.
pub(super) trait Copying {
    /// Whether the start of the range is to be copied, and for how many bytes that holds.
    fn look(&self, range: ByteRange) -> LocalFuture<'_, Result<(bool, u64)>>;

    /// Copies the range, or what of it is still to be copied.
    fn copy(&self, range: ByteRange) -> LocalFuture<'_, Result<(), CopyError>>;

    /// A part whose error is ignored is tried again, not left out.
    fn retries(&self) -> bool;
}

/// The stretch. The job's progress is its first byte that is not done yet.
pub(super) struct Stretch {
    job: Rc<Job>,
    work: Rc<dyn Copying>,
    pace: Rc<Pace>,
    size: u64,
    cursor: Cell<u64>,
    in_flight: RefCell<Vec<u64>>,
}

impl Stretch {
    /// `size` bytes from 0 on.
    pub(super) fn new(job: &Rc<Job>, work: Rc<dyn Copying>, pace: &Rc<Pace>, size: u64) -> Stretch {
        Stretch {
            job: job.clone(),
            work,
            pace: pace.clone(),
            size,
            cursor: Cell::new(0),
            in_flight: RefCell::default(),
        }
    }

    fn show_progress(&self) {
        let in_flight = self.in_flight.borrow();
        let first = in_flight.iter().min().copied();
        self.job.set_current(first.unwrap_or(self.cursor.get()));
    }

    fn take(&self, length: u64) -> ByteRange {
        let start = self.cursor.get();
        self.in_flight.borrow_mut().push(start);
        self.cursor.set(start + length);
        ByteRange::between(start, start + length)
    }

    async fn find(&self) -> Option<ByteRange> {
        while self.cursor.get() < self.size && !self.job.is_cancelled() {
            let most = if self.job.speed() > 0 {
                LIMITED_PIECE
            } else {
                self.pace.piece_length()
            };
            let start = self.cursor.get();
            let rest = ByteRange::between(start, self.size.min(start + MOST_LOOKED_AT));
            let piece = rest.length().min(most);
            match self.work.look(rest).await {
                Ok((true, length)) => return Some(self.take(length.min(piece))),
                Ok((false, length)) => {
                    self.cursor.set(self.cursor.get() + length);
                    self.show_progress();
                }
                // Copying it meets the error again, where it is dealt with.
                Err(_) => return Some(self.take(piece)),
            }
        }
        None
    }
}

impl Pieces for Stretch {
    fn next(&self) -> LocalFuture<'_, Option<ByteRange>> {
        Box::pin(self.find())
    }

    fn carry_out(&self, piece: ByteRange) -> LocalFuture<'_, Result<(), CopyError>> {
        self.work.copy(piece)
    }

    fn ended(&self, piece: ByteRange) {
        let start = piece.start();
        self.in_flight.borrow_mut().retain(|other| *other != start);
        self.show_progress();
    }

    fn retries(&self) -> bool {
        self.work.retries()
    }
}

//! Work in pieces, several of them in flight: each is admitted by the job, carried out, and tried again
//! or given up as the error policy says.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::copy::{CopyError, Pace, run};
use super::{ErrorAction, ErrorPolicies, Job, LocalFuture, Operation, Piece};
use crate::error::Error;
use crate::range::ByteRange;

/// Before a piece whose error was ignored is tried again. What fails at once would fail as often as the thread can ask, and
/// nobody else would get a turn.
const BREATHER: Duration = Duration::from_millis(100);

/// Where pieces come from, and what is done with each.
pub(super) trait Pieces {
    /// The next piece; `None`: there is none now.
    fn next(&self) -> LocalFuture<'_, Option<ByteRange>>;

    /// Copies a piece.
    fn carry_out(&self, piece: ByteRange) -> LocalFuture<'_, Result<(), CopyError>>;

    /// The piece is done, or will not be.
    fn ended(&self, piece: ByteRange);

    /// A piece whose error is ignored is tried again, not left out.
    fn retries(&self) -> bool;

    /// What a piece counts against the speed limit, in bytes.
    fn cost(&self, piece: ByteRange) -> u64 {
        piece.length()
    }
}

/// Works off pieces for a job.
pub(super) struct Crew {
    job: Rc<Job>,
    policies: ErrorPolicies,
    /// A piece has failed for good: of the others nothing is told.
    failed: Cell<bool>,
    /// The first error that was ignored by leaving a piece out.
    ignored: RefCell<Option<Error>>,
}

impl Crew {
    pub(super) fn new(job: &Rc<Job>, policies: ErrorPolicies) -> Crew {
        Crew {
            job: job.clone(),
            policies,
            failed: Cell::new(false),
            ignored: RefCell::default(),
        }
    }

    /// Works until there is no piece left or the job is cancelled; answers the first error that was
    /// ignored by leaving a piece out.
    ///
    /// # Errors
    /// The first that the policy says to report. Nothing is in flight afterwards.
    pub(super) async fn work_off(
        self,
        pieces: Rc<dyn Pieces>,
        pace: &Pace,
    ) -> Result<Option<Error>, Error> {
        let crew = Rc::new(self);
        let next = async || {
            let admission = crew.job.admit().await?;
            let piece = pieces.next().await?;
            Some(crew.clone().carry_out(pieces.clone(), admission, piece))
        };
        // With a speed limit a piece is paid for before the next begins.
        let limit = || {
            if crew.job.speed() > 0 {
                1
            } else {
                pace.limit()
            }
        };
        run(crew.job.handle(), next, limit).await?;
        Ok(crew.ignored.take())
    }

    async fn carry_out(
        self: Rc<Self>,
        pieces: Rc<dyn Pieces>,
        admission: Piece,
        piece: ByteRange,
    ) -> Result<(), Error> {
        let mut admission = admission;
        while let Err(failure) = pieces.carry_out(piece).await {
            // A pause holds when no piece is in flight.
            drop(admission);
            if self.judge(&failure)? == ErrorAction::Ignore {
                if !pieces.retries() {
                    let error = failure.error().duplicate();
                    self.ignored.borrow_mut().get_or_insert(error);
                    pieces.ended(piece);
                    return Ok(());
                }
                self.job.rest(BREATHER).await;
            }
            let Some(again) = self.job.admit().await else {
                // Cancelled: the piece is not done, and does not count as progress.
                return Ok(());
            };
            admission = again;
        }
        self.job.account(pieces.cost(piece));
        pieces.ended(piece);
        Ok(())
    }

    fn judge(&self, failure: &CopyError) -> Result<ErrorAction, Error> {
        let error = failure.error();
        if self.failed.get() {
            return Err(error.duplicate());
        }
        let operation = if failure.is_read() {
            Operation::Read
        } else {
            Operation::Write
        };
        let action = self
            .job
            .failed(self.policies.of(operation), operation, error);
        if action == ErrorAction::Report {
            self.failed.set(true);
            return Err(error.duplicate());
        }
        Ok(action)
    }
}

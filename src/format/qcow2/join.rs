//! Runs the pieces of one request side by side.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use crate::error::Result;

/// A piece of a request.
pub(super) type Piece<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Runs all pieces to their end, also where one fails: afterwards nothing of them is in flight.
/// Answers the first failure in their order.
pub(super) async fn join(mut pieces: Vec<Piece<'_>>) -> Result<()> {
    if pieces.len() == 1
        && let Some(piece) = pieces.pop()
    {
        return piece.await;
    }
    let mut results: Vec<Option<Result<()>>> = pieces.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut waits = false;
        for (piece, result) in pieces.iter_mut().zip(&mut results) {
            if result.is_none() {
                match piece.as_mut().poll(context) {
                    Poll::Ready(end) => *result = Some(end),
                    Poll::Pending => waits = true,
                }
            }
        }
        if waits {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// [`join`], with at most `most` pieces in flight.
pub(super) async fn join_some<'a>(
    pieces: impl Iterator<Item = Piece<'a>>,
    most: usize,
) -> Result<()> {
    let mut pieces = pieces.peekable();
    let mut outcome = Ok(());
    while pieces.peek().is_some() {
        let group: Vec<Piece<'_>> = pieces.by_ref().take(most).collect();
        outcome = outcome.and(join(group).await);
    }
    outcome
}

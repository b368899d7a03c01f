//! Several pieces of one work in flight.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

use crate::runtime::Handle;
use crate::runtime::sync::Notify;

/// What the pieces tell who waits for them.
struct Board<E> {
    in_flight: Cell<usize>,
    failure: RefCell<Option<E>>,
    changed: Notify,
}

/// Carries out the pieces that `next` gives, side by side, at most as many as `limit` says each time
/// (at least one). Returns when `next` has given nothing and all pieces have ended: the work is done,
/// or is to pause. After a failure no further piece is asked for; those in flight end, and the first
/// failure is the answer. Every piece that `next` has given is carried out.
///
/// A piece is a task of its own: dropping this future takes no further piece, and those in flight run
/// to their ends. `next` may wait (for a speed limit, for a lock on the piece's range) while pieces go
/// on; it is not called while the limit is reached.
///
/// # Errors
/// The first failure of a piece.
pub async fn run<P, E>(
    handle: &Handle,
    mut next: impl AsyncFnMut() -> Option<P>,
    mut limit: impl FnMut() -> usize,
) -> Result<(), E>
where
    P: Future<Output = Result<(), E>> + 'static,
    E: 'static,
{
    let board = Rc::new(Board {
        in_flight: Cell::new(0),
        failure: RefCell::new(None),
        changed: Notify::new(),
    });
    while board.failure.borrow().is_none() {
        if board.in_flight.get() >= limit().max(1) {
            board.changed.notified().await;
            continue;
        }
        let Some(piece) = next().await else { break };
        start(handle, &board, piece);
    }
    while board.in_flight.get() > 0 {
        board.changed.notified().await;
    }
    match board.failure.take() {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

fn start<P, E>(handle: &Handle, board: &Rc<Board<E>>, piece: P)
where
    P: Future<Output = Result<(), E>> + 'static,
    E: 'static,
{
    board.in_flight.set(board.in_flight.get() + 1);
    let place = Place(board.clone());
    let task = async move {
        if let Err(failure) = piece.await {
            place.0.failure.borrow_mut().get_or_insert(failure);
        }
    };
    handle.spawn(task).detach();
}

/// Counts a piece until it has ended.
struct Place<E>(Rc<Board<E>>);

impl<E> Drop for Place<E> {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        self.0.changed.notify_one();
    }
}

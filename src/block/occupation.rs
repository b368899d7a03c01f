//! Who keeps a node from being used for something else (QEMU's operation blockers).
//!
//! Some of those change what the node shows, and nobody new may come to look at it meanwhile: a job that
//! commits into a base would pull the ground from under a new overlay of it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};

use super::{Node, Role};

/// Why a node is busy, oldest reason first.
#[derive(Default)]
pub(super) struct Occupations {
    reasons: RefCell<Vec<Reason>>,
    next: Cell<u64>,
}

struct Reason {
    number: u64,
    text: String,
    content: Content,
}

/// What becomes of the content of a busy node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It changes only as its users write.
    Stays,
    /// It is not what it was any more, also when the node is free again.
    Changes,
}

/// A reason for a node to be busy, until dropped.
pub struct Occupation {
    all: Rc<Occupations>,
    number: u64,
}

impl Node {
    /// Keeps jobs and changes off the node, for a reason that they are told; where its content changes
    /// new readers, too.
    pub fn occupy(&self, reason: impl Into<String>, content: Content) -> Occupation {
        let all = self.occupations.clone();
        let number = all.next.get();
        all.next.set(number + 1);
        all.reasons.borrow_mut().push(Reason {
            number,
            text: reason.into(),
            content,
        });
        Occupation { all, number }
    }

    /// Only users are above the node, no other node.
    ///
    /// # Errors
    /// Another node is, in QEMU's words.
    pub fn check_root(&self) -> Result<()> {
        match self.parents().iter().all(|edge| edge.role() == Role::Root) {
            true => Ok(()),
            false => Err(Error::refused("Need a root block node")),
        }
    }

    /// Nobody keeps others off the node.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the reason.
    pub fn check_unoccupied(&self) -> Result<()> {
        match self.occupations.reasons.borrow().first() {
            None => Ok(()),
            Some(reason) => Err(self.busy(&reason.text)),
        }
    }

    /// What the node shows is not changed by anybody but its users: it may get an overlay.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the reason, also where it is what a filter passes on that changes.
    pub fn check_content_stays(self: &Rc<Node>) -> Result<()> {
        let mut node = self.clone();
        loop {
            node.check_own_content_stays()?;
            let Some(edge) = node.filtered() else {
                return Ok(());
            };
            node = edge.node();
        }
    }

    fn check_own_content_stays(&self) -> Result<()> {
        let reasons = self.occupations.reasons.borrow();
        let changing = reasons
            .iter()
            .find(|reason| reason.content == Content::Changes);
        match changing {
            None => Ok(()),
            Some(reason) => Err(self.busy(&format!("{}, which changes its content", reason.text))),
        }
    }

    fn busy(&self, reason: &str) -> Error {
        let message = format!("Node '{}' is busy: {reason}", self.name());
        Error::new(ErrorKind::InUse, message)
    }
}

impl Drop for Occupation {
    fn drop(&mut self) {
        let mut reasons = self.all.reasons.borrow_mut();
        reasons.retain(|reason| reason.number != self.number);
    }
}

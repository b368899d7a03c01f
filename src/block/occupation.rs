//! Who keeps a node from being used for something else (QEMU's operation blockers).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};

use super::Node;

/// Why a node is busy, oldest reason first.
#[derive(Default)]
pub(super) struct Occupations {
    reasons: RefCell<Vec<(u64, String)>>,
    next: Cell<u64>,
}

/// A reason for a node to be busy, until dropped.
pub struct Occupation {
    all: Rc<Occupations>,
    number: u64,
}

impl Node {
    /// Keeps jobs and changes off the node, for a reason that they are told.
    pub fn occupy(&self, reason: impl Into<String>) -> Occupation {
        let all = self.occupations.clone();
        let number = all.next.get();
        all.next.set(number + 1);
        all.reasons.borrow_mut().push((number, reason.into()));
        Occupation { all, number }
    }

    /// Nobody keeps others off the node.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the reason.
    pub fn check_unoccupied(&self) -> Result<()> {
        match self.occupations.reasons.borrow().first() {
            None => Ok(()),
            Some((_, reason)) => {
                let message = format!("Node '{}' is busy: {reason}", self.name());
                Err(Error::new(ErrorKind::InUse, message))
            }
        }
    }
}

impl Drop for Occupation {
    fn drop(&mut self) {
        let mut reasons = self.all.reasons.borrow_mut();
        reasons.retain(|(number, _)| *number != self.number);
    }
}

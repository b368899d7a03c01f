//! The rules of `blkdebug`: events change a state and arm errors, requests meet them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bitflags::bitflags;
use nix::errno::Errno;

use crate::block::DebugEvent;
use crate::range::ByteRange;

/// Bytes in a sector of a rule.
const SECTOR: u64 = 512;

bitflags! {
    /// Kinds of requests that an error is for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoTypes: u8 {
        /// Reads.
        const READ = 1;
        /// Writes of data.
        const WRITE = 2;
        /// Writes of zeroes.
        const WRITE_ZEROES = 4;
        /// Discards.
        const DISCARD = 8;
        /// Flushes.
        const FLUSH = 16;
        /// Questions for the block status.
        const BLOCK_STATUS = 32;
    }
}

impl Default for IoTypes {
    /// All that are not only a question.
    fn default() -> IoTypes {
        IoTypes::all() - IoTypes::BLOCK_STATUS
    }
}

/// An error, and when it is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// It is armed when this happens, instead of those that were before.
    pub event: DebugEvent,
    /// Only in this state; 0: in any.
    pub state: i64,
    /// The requests that meet it.
    pub requests: IoTypes,
    /// The error; `None` lets requests pass.
    pub errno: Option<Errno>,
    /// Only requests that touch this sector.
    pub sector: Option<u64>,
    /// The rule is gone once it was met.
    pub once: bool,
    /// The error comes before anything else runs.
    pub immediately: bool,
}

/// A change of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetState {
    /// When it is changed.
    pub event: DebugEvent,
    /// Only from this state; 0: from any.
    pub state: i64,
    /// The state then.
    pub new_state: i64,
}

/// The rules of a node, and the state that they have come to.
pub(super) struct Rules {
    errors: RefCell<Vec<Rc<InjectError>>>,
    changes: Vec<SetState>,
    state: Cell<i64>,
    /// The errors that requests meet now, the last armed first.
    armed: RefCell<Vec<Rc<InjectError>>>,
}

impl Rules {
    pub(super) fn new(errors: &[InjectError], changes: &[SetState]) -> Rules {
        let rules = Rules {
            errors: RefCell::new(errors.iter().cloned().map(Rc::new).collect()),
            changes: changes.to_vec(),
            state: Cell::new(1),
            armed: RefCell::default(),
        };
        rules.happens(DebugEvent::None);
        rules
    }

    /// There is nothing that a request could meet or change.
    pub(super) fn are_none(&self) -> bool {
        self.changes.is_empty() && self.errors.borrow().is_empty()
    }

    /// All rules for the event see the state that was before it.
    pub(super) fn happens(&self, event: DebugEvent) {
        let state = self.state.get();
        let holds = |wanted: i64| wanted == 0 || wanted == state;
        let errors = self.errors.borrow();
        let now = errors
            .iter()
            .filter(|rule| rule.event == event && holds(rule.state));
        let now: Vec<Rc<InjectError>> = now.rev().cloned().collect();
        if !now.is_empty() {
            *self.armed.borrow_mut() = now;
        }
        for change in &self.changes {
            if change.event == event && holds(change.state) {
                self.state.set(change.new_state);
            }
        }
    }

    /// The error that a request meets, and whether at once. Flushes touch no range.
    pub(super) fn meet(&self, kind: IoTypes, range: Option<ByteRange>) -> Option<(Errno, bool)> {
        let touches = |rule: &InjectError| match rule.sector {
            None => true,
            Some(sector) => range.is_some_and(|range| {
                let at = sector.saturating_mul(SECTOR);
                range.start() <= at && at < range.end()
            }),
        };
        let mut armed = self.armed.borrow_mut();
        let met = armed
            .iter()
            .position(|rule| rule.requests.contains(kind) && touches(rule))?;
        let rule = armed[met].clone();
        let errno = rule.errno?;
        if rule.once {
            armed.remove(met);
            self.errors
                .borrow_mut()
                .retain(|other| !Rc::ptr_eq(other, &rule));
        }
        Some((errno, rule.immediately))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(event: DebugEvent) -> InjectError {
        InjectError {
            event,
            state: 0,
            requests: IoTypes::default(),
            errno: Some(Errno::EIO),
            sector: None,
            once: false,
            immediately: true,
        }
    }

    fn range(start: u64, end: u64) -> Option<ByteRange> {
        Some(ByteRange::between(start, end))
    }

    #[test]
    fn an_error_without_event_is_armed_from_the_start() {
        let rules = Rules::new(&[error(DebugEvent::None)], &[]);
        let met = rules.meet(IoTypes::READ, range(0, 1));
        assert_eq!(met, Some((Errno::EIO, true)));
        assert_eq!(rules.meet(IoTypes::BLOCK_STATUS, range(0, 1)), None);
        assert!(rules.meet(IoTypes::FLUSH, None).is_some());
    }

    #[test]
    fn an_error_for_once_is_met_once() {
        let once = InjectError {
            once: true,
            sector: Some(2),
            ..error(DebugEvent::WriteAio)
        };
        let rules = Rules::new(&[once], &[]);
        assert_eq!(rules.meet(IoTypes::WRITE, range(1024, 1536)), None);
        rules.happens(DebugEvent::WriteAio);
        assert_eq!(rules.meet(IoTypes::WRITE, range(0, 1024)), None);
        assert_eq!(rules.meet(IoTypes::FLUSH, None), None);
        assert!(rules.meet(IoTypes::WRITE, range(512, 2048)).is_some());
        rules.happens(DebugEvent::WriteAio);
        assert_eq!(rules.meet(IoTypes::WRITE, range(512, 2048)), None);
        assert!(rules.are_none());
    }

    #[test]
    fn states_lead_to_errors() {
        let change = |state, new_state| SetState {
            event: DebugEvent::ReadAio,
            state,
            new_state,
        };
        let in_state_3 = InjectError {
            state: 3,
            ..error(DebugEvent::ReadAio)
        };
        let rules = Rules::new(&[in_state_3], &[change(1, 2), change(2, 3)]);
        let mut met = Vec::new();
        for _ in 0..3 {
            rules.happens(DebugEvent::ReadAio);
            met.push(rules.meet(IoTypes::READ, range(0, 1)).is_some());
        }
        assert_eq!(met, [false, false, true]);
    }
}

//! Rules by which a simulated disk fails.

use nix::errno::Errno;

use crate::range::ByteRange;

/// Kinds of disk operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOperation {
    /// Data to memory.
    Read,
    /// Memory to data.
    Write,
    /// Zeroes.
    WriteZeroes,
    /// Space given back.
    Discard,
    /// What was written becomes durable.
    Flush,
    /// Another size.
    Truncate,
}

/// A rule.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Operations that it concerns; empty: all.
    pub operations: Vec<DiskOperation>,
    /// Only those that touch this range, where given; flushes touch none.
    pub range: Option<ByteRange>,
    /// So many pass before the first that fails.
    pub skip: u64,
    /// How it fails.
    pub errno: Errno,
    /// All after it fail too.
    pub lasting: bool,
}

impl Fault {
    /// The operation number `nth` (from 0) of these kinds fails, once.
    pub fn once(operations: &[DiskOperation], nth: u64, errno: Errno) -> Fault {
        Fault {
            operations: operations.to_vec(),
            range: None,
            skip: nth,
            errno,
            lasting: false,
        }
    }

    /// The operation number `nth` (from 0) of these kinds fails, and all after it.
    pub fn from(operations: &[DiskOperation], nth: u64, errno: Errno) -> Fault {
        Fault {
            lasting: true,
            ..Fault::once(operations, nth, errno)
        }
    }

    fn concerns(&self, operation: DiskOperation, range: &ByteRange) -> bool {
        let kind = self.operations.is_empty() || self.operations.contains(&operation);
        kind && self.range.is_none_or(|touched| touched.overlaps(range))
    }
}

/// The rules of a disk, and how often they struck.
#[derive(Default)]
pub(super) struct FaultRules {
    rules: Vec<Fault>,
    struck: u64,
}

impl FaultRules {
    pub(super) fn add(&mut self, fault: Fault) {
        self.rules.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// Operations that failed by a rule.
    pub(super) fn struck(&self) -> u64 {
        self.struck
    }

    /// How this operation fails, if it does. Every rule counts it.
    pub(super) fn strike(&mut self, operation: DiskOperation, range: &ByteRange) -> Option<Errno> {
        let mut errno = None;
        self.rules.retain_mut(|rule| {
            if !rule.concerns(operation, range) {
                return true;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                return true;
            }
            errno = Some(rule.errno);
            rule.lasting
        });
        self.struck += u64::from(errno.is_some());
        errno
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anywhere() -> ByteRange {
        ByteRange::between(0, 0)
    }

    #[test]
    fn the_nth_fails_once_or_for_ever() {
        let mut rules = FaultRules::default();
        rules.add(Fault::once(&[DiskOperation::Write], 1, Errno::EIO));
        let mut write = || rules.strike(DiskOperation::Write, &anywhere());
        assert_eq!([write(), write(), write()], [None, Some(Errno::EIO), None]);
        rules.add(Fault::from(&[], 1, Errno::ENOSPC));
        let mut any = |operation| rules.strike(operation, &anywhere());
        assert_eq!(any(DiskOperation::Read), None);
        assert_eq!(any(DiskOperation::Flush), Some(Errno::ENOSPC));
        assert_eq!(any(DiskOperation::Read), Some(Errno::ENOSPC));
        assert_eq!(rules.struck(), 3);
    }

    #[test]
    fn a_rule_with_a_range_spares_the_rest() {
        let mut rules = FaultRules::default();
        let fault = Fault::from(&[DiskOperation::Read], 0, Errno::EIO);
        rules.add(Fault {
            range: Some(ByteRange::between(512, 1024)),
            ..fault
        });
        let read = ByteRange::between(0, 512);
        assert_eq!(rules.strike(DiskOperation::Read, &read), None);
        let read = ByteRange::between(0, 513);
        assert_eq!(rules.strike(DiskOperation::Read, &read), Some(Errno::EIO));
    }
}

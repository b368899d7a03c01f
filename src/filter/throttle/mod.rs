//! `throttle`: requests wait until the limits of the node's group leave room for them.
//!
//! Nodes of a group share its limits and take turns. Limits are changed while requests wait. Time is
//! the runtime's. Nothing waits in a drained section: then requests pass, and count all the same.

mod bucket;
mod group;
mod limits;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{
    Child, Driver, Extent, Forward, IoFuture, Limits, Permissions, Role, Transfer, TransferKind,
    TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::range::ByteRange;

use bucket::Direction;
use group::Membership;

pub use group::{ThrottleGroup, ThrottleGroups};
pub use limits::{Rate, ThrottleLimits};

/// The driver.
pub struct Throttle {
    file: Rc<Child>,
    membership: RefCell<Rc<Membership>>,
    hurried: Rc<Cell<u32>>,
}

impl Throttle {
    /// A node whose requests count for `group`.
    pub fn new(file: Rc<Child>, group: Rc<ThrottleGroup>) -> Throttle {
        let hurried = Rc::default();
        Throttle {
            file,
            membership: RefCell::new(Rc::new(Membership::new(group, &hurried))),
            hurried,
        }
    }

    /// The group it is in.
    pub fn group(&self) -> Rc<ThrottleGroup> {
        self.membership.borrow().group().clone()
    }

    /// Another group. In a drained section: no request waits.
    pub fn set_group(&self, group: Rc<ThrottleGroup>) {
        let membership = Rc::new(Membership::new(group, &self.hurried));
        self.membership.replace(membership);
    }

    fn membership(&self) -> Rc<Membership> {
        self.membership.borrow().clone()
    }

    async fn admit(&self, direction: Direction, bytes: u64) {
        self.membership().admit(direction, bytes).await;
    }
}

impl Driver for Throttle {
    fn driver_name(&self) -> &'static str {
        "throttle"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(file: size, limits, flush, block_status, truncate);

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.admit(Direction::Read, payload.length() as u64).await;
            self.file.read(offset, payload).await
        })
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.admit(Direction::Write, payload.length() as u64).await;
            self.file.write(offset, payload, flags).await
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.admit(Direction::Write, range.length()).await;
            self.file.write_zeroes(range, flags).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.admit(Direction::Write, range.length()).await;
            self.file.discard(range).await
        })
    }

    /// What need not wait goes on.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let direction = match transfer.kind {
            TransferKind::Read => Direction::Read,
            TransferKind::Write(_) => Direction::Write,
        };
        let membership = self.membership.borrow();
        membership
            .try_admit(direction, transfer.length)
            .then(|| Forward {
                child: self.file.clone(),
                offset: transfer.offset,
                guard: None,
            })
    }

    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        assert!(role == Role::File, "throttle has no {} child", role.name());
        users.for_filter()
    }

    fn set_hurried(&self, hurried: bool) {
        let count = self.hurried.get();
        self.hurried
            .set(if hurried { count + 1 } else { count - 1 });
        self.membership.borrow().wake();
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.flush()
    }
}

#[cfg(test)]
mod tests;

//! `commit_top`: stands above the layers that a job commits, so that nobody above them needs anything of
//! them but what the job lets be.

use std::any::Any;
use std::rc::Rc;

use crate::block::{
    Child, Driver, Extent, Forward, IoFuture, Limits, Permissions, Role, Transfer, TransferKind,
    TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::range::ByteRange;

/// The driver.
pub struct CommitTop {
    child: Rc<Child>,
}

impl CommitTop {
    /// Above the node of this edge.
    pub fn new(child: Rc<Child>) -> CommitTop {
        CommitTop { child }
    }
}

impl Driver for CommitTop {
    fn driver_name(&self) -> &'static str {
        "commit_top"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(child: size, limits, flush, block_status, discard, truncate);

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.child.read(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        Box::pin(self.child.write(offset, payload, flags))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(self.child.write_zeroes(range, flags))
    }

    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        (transfer.kind == TransferKind::Read).then(|| Forward {
            child: self.child.clone(),
            offset: transfer.offset,
            guard: None,
        })
    }

    /// Reads go on without a claim: the content of the layers below is a mixture while the job runs.
    fn child_permissions(&self, _role: Role, _users: Permissions, _writable: bool) -> Permissions {
        Permissions::NONE
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

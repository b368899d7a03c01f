//! `snapshot-access`: shows what a `copy-before-write` filter below keeps, to read a moment of a disk while
//! its guest goes on. What is discarded here is not kept any longer.

use std::any::Any;
use std::rc::Rc;

use nix::errno::Errno;

use super::{CopyBeforeWrite, Snapshot};
use crate::block::{
    Child, Driver, Extent, IoFuture, Limits, Node, Permission, Permissions, Role, WriteFlags,
    ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// The driver.
pub struct SnapshotAccess {
    file: Rc<Child>,
}

impl SnapshotAccess {
    /// Of the first `copy-before-write` filter from the node of `file` on.
    pub fn new(file: Rc<Child>) -> SnapshotAccess {
        SnapshotAccess { file }
    }

    /// # Errors
    /// `EOPNOTSUPP`: there is none.
    fn snapshot(&self) -> Result<Rc<Snapshot>> {
        let top = self.file.node();
        let mut next = Some(top.clone());
        while let Some(node) = next {
            if let Some(filter) = node.driver_as::<CopyBeforeWrite>() {
                return Ok(filter.snapshot().clone());
            }
            next = below(&node);
        }
        let text = format!("Node '{}' keeps no snapshot", top.name());
        Err(Error::from_errno(Errno::EOPNOTSUPP, text))
    }
}

fn below(node: &Node) -> Option<Rc<Node>> {
    node.filtered().map(|edge| edge.node())
}

fn only_read<'a>() -> IoFuture<'a, ()> {
    let text = "A snapshot cannot be written";
    Box::pin(async move { Err(Error::from_errno(Errno::EOPNOTSUPP, text)) })
}

impl Driver for SnapshotAccess {
    fn driver_name(&self) -> &'static str {
        "snapshot-access"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.file.node().size()
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: 1,
            memory_alignment: 1,
            ..Limits::default()
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _passage = self.file.enter().await;
            self.snapshot()?.read(offset, payload).await
        })
    }

    fn write(&self, _offset: u64, _payload: Payload, _flags: WriteFlags) -> IoFuture<'_, ()> {
        only_read()
    }

    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_, ()> {
        only_read()
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _passage = self.file.enter().await;
            self.snapshot()?.discard(range).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(async move {
            let _passage = self.file.enter().await;
            self.snapshot()?.block_status(range).await
        })
    }

    /// The filter reads the disk for it, and nobody may come between.
    fn child_permissions(&self, _role: Role, _users: Permissions, _writable: bool) -> Permissions {
        Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::all(),
        }
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

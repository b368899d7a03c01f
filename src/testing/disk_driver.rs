//! The simulated disk as a protocol driver.

use std::any::Any;
use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{
    Driver, Extent, ExtentKind, IoFuture, Limits, Permissions, Role, TruncateOptions, WriteFlags,
    ZeroFlags,
};
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, Result};
use crate::range::ByteRange;

use super::disk::Change;
use super::{DiskOperation, SimulatedDisk};

/// What a buffer holds while a read into it is in flight.
const POISON: u8 = 0xa5;

/// What a discarded range may read as.
const GARBAGE: u8 = 0xdd;

/// A node's view of a [`SimulatedDisk`].
pub(super) struct DiskDriver {
    disk: SimulatedDisk,
}

impl DiskDriver {
    pub(super) fn new(disk: SimulatedDisk) -> DiskDriver {
        DiskDriver { disk }
    }
}

impl Driver for DiskDriver {
    fn driver_name(&self) -> &'static str {
        "simulated"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> Limits {
        let options = self.disk.options();
        Limits {
            request_alignment: options.request_alignment,
            logical_block_size: options.request_alignment,
            native_fua: options.native_fua,
            ..Limits::default()
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.disk.start(read(self.disk.clone(), offset, payload)))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let work = write(self.disk.clone(), offset, payload, flags);
        Box::pin(self.disk.start(work))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        assert!(!flags.contains(ZeroFlags::FUA), "the edge flushes instead");
        if !self.disk.options().write_zeroes {
            return Box::pin(async { Err(Error::from(Errno::EOPNOTSUPP)) });
        }
        let disk = self.disk.clone();
        Box::pin(self.disk.start(async move {
            disk.change(DiskOperation::WriteZeroes, Change::Zero(range))
                .await
        }))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(self.disk.start(discard(self.disk.clone(), range)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.disk.start(flush(self.disk.clone())))
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        let (data, end) = self
            .disk
            .with_store(|store| store.extent(range.start(), range.end()));
        let length = end - range.start();
        let host_offset = Some(range.start());
        let kind = match data {
            true => ExtentKind::Data {
                host_offset,
                compressed: false,
            },
            false => ExtentKind::Zero { host_offset },
        };
        Box::pin(async move { Ok(Extent { length, kind }) })
    }

    fn truncate(&self, size: u64, _options: TruncateOptions) -> IoFuture<'_, ()> {
        let disk = self.disk.clone();
        Box::pin(self.disk.start(async move {
            disk.change(DiskOperation::Truncate, Change::Truncate(size))
                .await
        }))
    }

    fn child_permissions(&self, role: Role, _users: Permissions, _writable: bool) -> Permissions {
        unreachable!("a disk has no {} child", role.name())
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

async fn read(disk: SimulatedDisk, offset: u64, payload: Payload) -> Result<()> {
    let length = payload.length();
    let poison = MemorySlice::from_bytes(&vec![POISON; length]);
    payload.copy_in(0, &poison)?;
    disk.begin();
    let range = ByteRange::between(offset, offset + length as u64);
    disk.latency(DiskOperation::Read, &range).await?;
    let mut bytes = vec![0; length];
    disk.with_store(|store| store.read(offset, &mut bytes));
    payload.copy_in(0, &MemorySlice::from_bytes(&bytes))
}

async fn write(
    disk: SimulatedDisk,
    offset: u64,
    payload: Payload,
    flags: WriteFlags,
) -> Result<()> {
    let bytes: Rc<[u8]> = payload.to_memory()?.to_vec().into();
    let change = Change::Write(offset, bytes.clone());
    let outcome = disk.change(DiskOperation::Write, change).await;
    let after = payload.to_memory()?.to_vec();
    assert!(
        after == *bytes,
        "the buffer of a write of {:#x} bytes at {offset:#x} was changed in flight",
        bytes.len()
    );
    outcome?;
    if flags.contains(WriteFlags::FUA) && !disk.options().ignores_flush {
        disk.with_store(|store| store.make_durable(offset, bytes.len() as u64));
    }
    Ok(())
}

async fn discard(disk: SimulatedDisk, range: ByteRange) -> Result<()> {
    let end = range.end().min(disk.size()).max(range.start());
    let range = ByteRange::between(range.start(), end);
    let change = match disk.options().garbles_discards && disk.draw(2) == 0 {
        false => Change::Zero(range),
        true => Change::Write(range.start(), vec![GARBAGE; range.length() as usize].into()),
    };
    disk.change(DiskOperation::Discard, change).await
}

async fn flush(disk: SimulatedDisk) -> Result<()> {
    disk.begin();
    let moment = disk.with_store(|store| store.sequence());
    let nowhere = ByteRange::between(0, 0);
    disk.latency(DiskOperation::Flush, &nowhere).await?;
    if !disk.options().ignores_flush {
        disk.with_store(|store| store.flush(moment));
    }
    Ok(())
}

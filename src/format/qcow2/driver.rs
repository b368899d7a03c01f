//! The image as a node's driver.

use std::any::Any;
use std::rc::Rc;

use crate::block::{
    BitmapStore, Child, DebugEvent, Driver, Extent, Forward, IoFuture, Limits, Permissions, Role,
    Transfer, TransferGuard, TransferKind, TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::layout::Mapping;
use super::lookup::{Lookup, Purpose};

impl Driver for Qcow2 {
    fn driver_name(&self) -> &'static str {
        "qcow2"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        let cluster_size = self.geometry.cluster_size() as u32;
        Limits {
            discard_granularity: cluster_size,
            optimal_transfer: cluster_size,
            ..Limits::default()
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.read_guest(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let fua = flags.contains(WriteFlags::FUA);
        assert!(!fua, "the edge flushes after a FUA write");
        if flags.contains(WriteFlags::COMPRESSED) {
            return Box::pin(self.write_guest_compressed(offset, payload));
        }
        Box::pin(self.write_guest(offset, payload))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(self.zero_guest(range, flags))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(self.discard_guest(range))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.flush_all())
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(self.status(range))
    }

    fn truncate(&self, size: u64, _options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(self.resize(size))
    }

    /// Transfers to one run of data, and reads of what the backing file has, go on as they are.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let range = transfer.range();
        let purpose = match transfer.kind {
            TransferKind::Read => Purpose::Read,
            TransferKind::Write(flags) => {
                let waits = flags.contains(WriteFlags::FUA) && !self.progress.is_durable();
                let waits = waits || flags.contains(WriteFlags::COMPRESSED);
                if waits || !self.writable.get() {
                    return None;
                }
                Purpose::Write
            }
        };
        let Ok(Lookup::Run(run)) = self.lookup(range, purpose) else {
            return None;
        };
        let is_whole = run.range == range;
        let (child, offset) = match purpose {
            Purpose::Read if is_whole => self.read_target(&run)?,
            Purpose::Write if is_whole && run.is_in_place() => self.read_target(&run)?,
            _ => return None,
        };
        self.tell(match (purpose, run.mapping) {
            (Purpose::Write, _) => DebugEvent::WriteAio,
            (_, Mapping::Unallocated) => DebugEvent::ReadBackingAio,
            _ => DebugEvent::ReadAio,
        });
        let guard = matches!(run.mapping, Mapping::Data(_))
            .then(|| TransferGuard::Counted(self.epochs.enter()));
        Some(Forward {
            child,
            offset,
            guard,
        })
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.geometry.cluster_size())
    }

    fn compresses(&self) -> bool {
        true
    }

    fn child_permissions(&self, role: Role, users: Permissions, writable: bool) -> Permissions {
        match role {
            Role::Backing => users.for_backing(),
            _ => users.for_format_file(writable),
        }
    }

    fn set_backing(&self, backing: Option<Rc<Child>>) -> Result<()> {
        self.backing.replace(backing);
        Ok(())
    }

    fn set_file(&self, file: Rc<Child>) -> Result<()> {
        self.file.replace(file);
        Ok(())
    }

    fn change_backing_reference<'a>(
        &'a self,
        reference: Option<(&'a str, &'a str)>,
    ) -> IoFuture<'a, ()> {
        Box::pin(self.replace_backing_reference(reference))
    }

    fn set_read_only(&self, read_only: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            match (self.read_only.get(), read_only) {
                (false, true) => self.become_read_only().await,
                (true, false) => self.become_writable().await,
                _ => Ok(()),
            }
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let stored = Box::pin(self.close_bitmaps()).await;
            self.write_everything().await.and(stored)
        })
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }
}

impl Qcow2 {
    async fn become_read_only(&self) -> Result<()> {
        Box::pin(self.close_bitmaps()).await?;
        self.write_everything().await?;
        self.writable.set(false);
        self.read_only.set(true);
        Ok(())
    }

    /// Flushes, also what becomes free by that.
    async fn write_everything(&self) -> Result<()> {
        if self.read_only.get() {
            return Ok(());
        }
        loop {
            self.reclaim_quiet().await;
            if self.is_clean() {
                return self.file().flush().await;
            }
            self.flush_all().await?;
        }
    }
}

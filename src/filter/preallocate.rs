//! `preallocate`: writes past the end of a file get more space than they need, in one go.
//!
//! The space past what was written is the tail. It reads as zeroes, does not count for the node's size,
//! and is cut off when nobody writes any more. A crash leaves it; then it is part of the file.
//!
//! The tail grows only while no write past it is on its way, so that its zeroes never fall on data.

use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;

use crate::block::{
    Child, Driver, Extent, Forward, IoFuture, Limits, Permission, Permissions, Role, Transfer,
    TransferKind, TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::runtime::sync::Mutex;

/// How much more space writes get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreallocateOptions {
    /// Bytes past a write's end.
    pub size: u64,
    /// The end of the tail is a multiple of this many bytes; a multiple of 512.
    pub align: u64,
}

impl Default for PreallocateOptions {
    fn default() -> PreallocateOptions {
        PreallocateOptions {
            size: 128 << 20,
            align: 1 << 20,
        }
    }
}

impl PreallocateOptions {
    /// # Errors
    /// The alignment is none.
    pub fn check(&self) -> Result<()> {
        if self.align == 0 || !self.align.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "prealloc-align parameter of preallocate filter is not aligned to 512",
            ));
        }
        Ok(())
    }

    /// Where the tail ends when a write ends at `end`.
    fn tail_after(&self, end: u64) -> Option<u64> {
        let whole = end
            .checked_add(self.size)?
            .checked_next_multiple_of(self.align)?;
        i64::try_from(whole).is_ok().then_some(whole)
    }
}

/// Where data ends and where the tail does.
#[derive(Clone, Copy, Debug)]
struct Ends {
    data: u64,
    file: u64,
}

/// The driver.
pub struct Preallocate {
    file: Rc<Child>,
    options: Cell<PreallocateOptions>,
    /// Set while there may be a tail.
    ends: Cell<Option<Ends>>,
    growing: Mutex<()>,
}

impl Preallocate {
    /// A filter over a file that can grow.
    ///
    /// # Errors
    /// The options are not valid.
    pub fn new(file: Rc<Child>, options: PreallocateOptions) -> Result<Preallocate> {
        options.check()?;
        Ok(Preallocate {
            file,
            options: Cell::new(options),
            ends: Cell::new(None),
            growing: Mutex::new(()),
        })
    }

    /// How much more space writes get.
    pub fn options(&self) -> PreallocateOptions {
        self.options.get()
    }

    /// Other options, for writes to come.
    ///
    /// # Errors
    /// They are not valid; nothing has changed.
    pub fn set_options(&self, options: PreallocateOptions) -> Result<()> {
        options.check()?;
        self.options.set(options);
        Ok(())
    }

    fn may_grow(&self) -> bool {
        let needed = Permission::WRITE | Permission::RESIZE;
        self.file.permissions().required.contains(needed)
    }

    fn file_size(&self) -> u64 {
        self.file.node().size()
    }

    /// A write up to `end` needs no more space.
    fn has_room(&self, end: u64) -> bool {
        let file = self
            .ends
            .get()
            .map_or_else(|| self.file_size(), |ends| ends.file);
        end <= file || !self.may_grow()
    }

    async fn make_room(&self, end: u64) {
        if self.has_room(end) {
            return;
        }
        let _turn = self.growing.lock().await;
        if self.has_room(end) {
            return;
        }
        let size = self.file_size();
        let mut ends = self.ends.get().unwrap_or(Ends {
            data: size,
            file: size,
        });
        // Where there is no more space, the write tries what it needs by itself.
        let grown = match self.options.get().tail_after(end) {
            Some(tail) => self.zero(ByteRange::between(ends.file, tail)).await,
            None => None,
        };
        ends.file = grown.unwrap_or(end);
        // Writes in the room that there was have ended meanwhile.
        ends.data = self.ends.get().map_or(ends.data, |now| now.data);
        self.ends.set(Some(ends));
    }

    /// The end of the range, if it could be had as zeroes without writing them.
    async fn zero(&self, range: ByteRange) -> Option<u64> {
        match self.file.write_zeroes(range, ZeroFlags::NO_FALLBACK).await {
            Ok(()) => Some(range.end()),
            Err(error) => {
                tracing::debug!(%range, %error, "no preallocation");
                None
            }
        }
    }

    fn wrote_to(&self, end: u64) {
        if let Some(mut ends) = self.ends.get() {
            ends.data = ends.data.max(end);
            ends.file = ends.file.max(end);
            self.ends.set(Some(ends));
        }
    }

    /// Cuts the tail off.
    async fn trim(&self) -> Result<()> {
        let _turn = self.growing.lock().await;
        let Some(ends) = self.ends.get() else {
            return Ok(());
        };
        if self.file_size() > ends.data && self.may_grow() {
            self.file.truncate(ends.data, EXACT).await?;
        }
        self.ends.set(None);
        Ok(())
    }

    async fn resize(&self, size: u64, options: TruncateOptions) -> Result<()> {
        let _turn = self.growing.lock().await;
        if let Some(ends) = self.ends.get()
            && self.file_size() > ends.data
            && size > ends.data
        {
            // What a failed write left in the tail must not come up.
            self.file.truncate(ends.data, EXACT).await?;
        }
        self.file.truncate(size, options).await?;
        self.ends.set(None);
        Ok(())
    }
}

const EXACT: TruncateOptions = TruncateOptions {
    exact: true,
    zero_new: true,
};

impl Driver for Preallocate {
    fn driver_name(&self) -> &'static str {
        "preallocate"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(file: limits, flush, block_status, discard);

    fn size(&self) -> u64 {
        self.ends
            .get()
            .map_or_else(|| self.file_size(), |ends| ends.data)
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(async move { self.file.read(offset, payload).await })
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let end = offset + payload.length() as u64;
        Box::pin(async move {
            self.make_room(end).await;
            self.file.write(offset, payload, flags).await?;
            self.wrote_to(end);
            Ok(())
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.make_room(range.end()).await;
            self.file.write_zeroes(range, flags).await?;
            self.wrote_to(range.end());
            Ok(())
        })
    }

    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        Box::pin(self.resize(size, options))
    }

    /// Reads, and writes that end inside of what was written before.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let passes = transfer.kind == TransferKind::Read || transfer.range().end() <= self.size();
        passes.then(|| Forward {
            child: self.file.clone(),
            offset: transfer.offset,
            guard: None,
        })
    }

    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        assert!(
            role == Role::File,
            "preallocate has no {} child",
            role.name()
        );
        users.for_filter()
    }

    fn writers_gone(&self) -> IoFuture<'_, ()> {
        Box::pin(self.trim())
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Graph, Node};
    use crate::buffer::MemorySlice;
    use crate::runtime::Handle;
    use crate::testing::{
        DiskOperation, Fault, SimulatedDisk, attach_file, disk_of, insert, insert_with, simulate,
        writable,
    };
    use nix::errno::Errno;

    /// A file of 1000 bytes under the filter, and the edge of a format that writes it.
    fn open(handle: &Handle, graph: &Graph) -> (SimulatedDisk, Rc<Node>, Rc<Child>) {
        let disk = disk_of(handle, &[7; 1000], 1);
        let below = insert(graph, "disk", disk.driver());
        let file = graph.attach_for("filter", Role::File, &below, Permissions::NONE);
        let file = file.expect("no other user");
        let options = PreallocateOptions {
            size: 10_000,
            align: 4096,
        };
        let driver = Preallocate::new(file.clone(), options).expect("valid options");
        let node = insert_with(graph, "filter", Box::new(driver), vec![file], writable());
        node.set_monitor_owned(true);
        let format = attach_file(graph, &node);
        (disk, node, format)
    }

    async fn write(format: &Child, offset: u64, length: usize) -> Result<()> {
        let bytes = MemorySlice::zeroed(length);
        bytes.fill(0, length, 9);
        let flags = WriteFlags::empty();
        format.write(offset, bytes.into(), flags).await
    }

    #[test]
    fn the_tail_grows_and_goes_with_the_last_writer() {
        simulate(1, |handle| async move {
            let graph = Graph::new();
            let (disk, node, format) = open(&handle, &graph);
            write(&format, 0, 1000).await.expect("no fault");
            assert_eq!(disk.size(), 1000, "nothing past the end was written");
            write(&format, 2000, 100).await.expect("no fault");
            assert_eq!((node.size(), disk.size()), (2100, 12_288));
            write(&format, 5000, 100).await.expect("no fault");
            assert_eq!((node.size(), disk.size()), (5100, 12_288));
            graph.detach(&format).await.expect("no fault");
            assert_eq!((node.size(), disk.size()), (5100, 5100));
            let bytes = disk.to_bytes();
            assert_eq!(
                (bytes[999], bytes[1500], bytes[2050], bytes[5099]),
                (9, 0, 9, 9)
            );
        });
    }

    /// Zeroes of the tail never fall on what is written past the end at the same time.
    #[test]
    fn writes_past_the_end_do_not_lose_to_the_tail() {
        simulate(2, |handle| async move {
            let graph = Graph::new();
            let (disk, _, format) = open(&handle, &graph);
            let writes: Vec<_> = (0..40)
                .map(|index| {
                    let format = format.clone();
                    let offset = 1000 + (index * 7 % 40) * 1500;
                    handle.spawn(async move { write(&format, offset, 1500).await })
                })
                .collect();
            for write in writes {
                write.await.expect("no fault");
            }
            graph.detach(&format).await.expect("no fault");
            let bytes = disk.to_bytes();
            assert_eq!(bytes.len(), 61_000);
            assert!(bytes[1000..].iter().all(|byte| *byte == 9));
        });
    }

    #[test]
    fn without_space_for_the_tail_writes_go_on() {
        simulate(3, |handle| async move {
            let graph = Graph::new();
            let (disk, node, format) = open(&handle, &graph);
            disk.fail(Fault::from(&[DiskOperation::WriteZeroes], 0, Errno::ENOSPC));
            for index in 0..10 {
                write(&format, 1000 + index * 500, 500)
                    .await
                    .expect("no fault");
            }
            assert_eq!((node.size(), disk.size()), (6000, 6000));
            disk.heal();
            write(&format, 6000, 500).await.expect("no fault");
            assert_eq!((node.size(), disk.size()), (6500, 20_480));
            let exact = TruncateOptions::default();
            format.truncate(3000, exact).await.expect("no fault");
            assert_eq!((node.size(), disk.size()), (3000, 3000));
        });
    }
}

//! A disk that an NBD server elsewhere exports.
//!
//! [`Nbd`] is the driver; a `Link` keeps one connection to the server and makes it again when it is lost; its
//! `Ledger` holds the requests until they are answered. What bytes mean is decided in [`crate::nbd`].
//!
//! Invariants:
//! - A request whose future is dropped is run to its end: the ledger owns its memory, and the stream stays in step.
//! - A flush never succeeds over a loss: when the connection goes, changes that were answered and not flushed may
//!   have gone with the server, so the flushes in flight fail, or else the next one does.
//! - A server that breaks the protocol loses the connection, nothing else: no panic, and memory for what was
//!   asked of it only.
//! - While the graph is to change no request waits for a connection, nor for ever for a silent server.

mod address;
mod ledger;
mod link;
mod reconnect;
mod stream;

use std::any::Any;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::block::{
    Driver, Extent, ExtentKind, IoFuture, Limits, Permission, Permissions, Role, TruncateOptions,
    WriteFlags, ZeroFlags,
};
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::{MAX_PAYLOAD, Question, STATE_HOLE, STATE_ZERO, Told, TransmissionFlags};
use crate::range::ByteRange;
use crate::runtime::Handle;

pub use address::NbdAddress;
use link::Link;

/// Largest write-zeroes, trim or block status request in bytes: lengths have 32 bits, and a server that writes zeroes
/// out answers within the time of a drained section.
const MAX_ZEROES: u64 = 1 << 30;
/// Alignment where the server announces none, and the size allows it.
const USUAL_ALIGNMENT: u32 = 512;

/// What to connect to, and for how long to try.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Where the server is.
    pub address: NbdAddress,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// How long requests wait for a lost connection.
    pub reconnect_delay: Duration,
    /// For how long opening is tried again.
    pub open_timeout: Duration,
    /// The node is to be written.
    pub writable: bool,
    /// It may be read-only all the same.
    pub auto_read_only: bool,
}

/// An export of an NBD server.
pub struct Nbd {
    link: Rc<Link>,
    limits: Limits,
}

impl Nbd {
    /// Connects.
    ///
    /// # Errors
    /// In QEMU's words: nobody listens, there is no such export, or it is read-only and to be written.
    pub async fn open(handle: &Handle, options: NbdOptions) -> Result<Nbd> {
        let needs_write = options.writable && !options.auto_read_only;
        let link = Link::open(handle, options).await?;
        let limits = limits(&link);
        let nbd = Nbd { link, limits };
        if needs_write && nbd.has(TransmissionFlags::READ_ONLY) {
            nbd.link.close().await;
            return Err(read_only());
        }
        Ok(nbd)
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.link.terms().flags.contains(flag)
    }

    async fn read_into(&self, range: ByteRange, memory: MemorySlice) -> Result<()> {
        // A format may read past the end.
        let end = range.end().min(self.size()).max(range.start());
        let inside = (end - range.start()) as usize;
        memory.fill(inside, memory.length() - inside, 0);
        if inside == 0 {
            return Ok(());
        }
        let range = ByteRange::between(range.start(), end);
        self.ask(Question::Read, range, Some(memory.slice(0, inside)))
            .await
    }

    async fn read_payload(&self, offset: u64, payload: Payload) -> Result<()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        if let Payload::Memory(memory) = payload {
            return self.read_into(range, memory).await;
        }
        let bounce = MemorySlice::zeroed(payload.length());
        self.read_into(range, bounce.clone()).await?;
        payload.copy_in(0, &bounce)
    }

    async fn write_payload(&self, offset: u64, payload: Payload, flags: WriteFlags) -> Result<()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        self.check_inside(range)?;
        let fua = flags.contains(WriteFlags::FUA);
        let memory = match payload {
            Payload::Memory(memory) => memory,
            other => other.to_memory()?,
        };
        self.ask(Question::Write { fua }, range, Some(memory)).await
    }

    async fn ask(
        &self,
        question: Question,
        range: ByteRange,
        memory: Option<MemorySlice>,
    ) -> Result<()> {
        self.link.ask(question, range, memory).await.map(|_| ())
    }

    fn check_inside(&self, range: ByteRange) -> Result<()> {
        if range.end() <= self.size() {
            return Ok(());
        }
        let size = self.size();
        let message = format!("{range} ends outside the NBD export of {size:#x} bytes");
        Err(Error::from_errno(Errno::ENOSPC, message))
    }

    async fn status(&self, range: ByteRange) -> Result<Extent> {
        let data = Extent::data(range.length(), range.start());
        let end = range.end().min(self.size());
        if end <= range.start() {
            return Ok(Extent::zero(range.length()));
        }
        if self.link.terms().allocation.is_none() {
            return Ok(data);
        }
        let alignment = u64::from(self.limits.request_alignment);
        let whole = ByteRange::between(range.start(), end).align_outward(alignment);
        let length = whole.length().min(MAX_ZEROES);
        let asked = ByteRange::between(whole.start(), whole.start() + length);
        let told = match self.link.ask(Question::BlockStatus, asked, None).await? {
            Told::Extent(extent) => extent,
            _ => return Ok(data),
        };
        let length = whole.start() + told.length - range.start().min(whole.start() + told.length);
        let length = length.min(end - range.start());
        if length == 0 {
            return Ok(data);
        }
        Ok(Extent {
            length,
            kind: kind_of(told.flags, range.start()),
        })
    }
}

/// A hole that is not said to be zero reads as anything: it is data.
fn kind_of(flags: u32, offset: u64) -> ExtentKind {
    let host_offset = Some(offset);
    match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
        (true, true) => ExtentKind::Zero { host_offset: None },
        (true, false) => ExtentKind::Zero { host_offset },
        (false, _) => ExtentKind::Data {
            host_offset,
            compressed: false,
        },
    }
}

fn limits(link: &Link) -> Limits {
    let terms = link.terms();
    let usual = match terms.size.is_multiple_of(u64::from(USUAL_ALIGNMENT)) {
        true => USUAL_ALIGNMENT,
        false => 1,
    };
    let minimum = terms.blocks.map_or(usual, |blocks| blocks.minimum);
    let preferred = terms.blocks.map_or(4096, |blocks| blocks.preferred);
    let maximum = terms.blocks.map_or(MAX_PAYLOAD, |blocks| blocks.maximum);
    let maximum = maximum.min(MAX_PAYLOAD);
    Limits {
        request_alignment: minimum,
        logical_block_size: minimum,
        max_transfer: maximum - maximum % minimum,
        max_zeroes: MAX_ZEROES,
        discard_granularity: minimum,
        optimal_transfer: preferred.clamp(4096, 1 << 21),
        native_fua: terms.flags.contains(TransmissionFlags::SEND_FUA),
        ..Limits::default()
    }
}

fn read_only() -> Error {
    let message = "request on write denied without write permission";
    Error::from_errno(Errno::EACCES, message)
}

impl Driver for Nbd {
    fn driver_name(&self) -> &'static str {
        "nbd"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.link.terms().size
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.read_payload(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        Box::pin(self.write_payload(offset, payload, flags))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check_inside(range)?;
            if !self.has(TransmissionFlags::SEND_WRITE_ZEROES) {
                let message = "The NBD server cannot write zeroes by itself";
                return Err(Error::from_errno(Errno::EOPNOTSUPP, message));
            }
            let no_hole = !flags.contains(ZeroFlags::MAY_UNMAP);
            self.ask(Question::WriteZeroes { no_hole }, range, None)
                .await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check_inside(range)?;
            match self.has(TransmissionFlags::SEND_TRIM) {
                true => self.ask(Question::Trim, range, None).await,
                false => Ok(()),
            }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            if !self.has(TransmissionFlags::SEND_FLUSH) {
                return self.link.check_lost();
            }
            let nothing = ByteRange::between(0, 0);
            self.ask(Question::Flush, nothing, None).await
        })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(self.status(range))
    }

    fn truncate(&self, size: u64, options: TruncateOptions) -> IoFuture<'_, ()> {
        let current = self.size();
        Box::pin(async move {
            if size > current {
                return Err(Error::refused("Cannot grow NBD nodes"));
            }
            match options.exact && size != current {
                true => Err(Error::new(
                    ErrorKind::Unsupported,
                    "Cannot resize NBD nodes",
                )),
                false => Ok(()),
            }
        })
    }

    fn child_permissions(&self, role: Role, _users: Permissions, _writable: bool) -> Permissions {
        unreachable!("an NBD node has no {} child", role.name())
    }

    fn prepare_permissions(&self, users: Permissions, writable: bool) -> Result<()> {
        let write = Permission::WRITE | Permission::WRITE_UNCHANGED;
        let writes = writable && users.required.intersects(write);
        match writes && self.has(TransmissionFlags::READ_ONLY) {
            true => Err(read_only()),
            false => Ok(()),
        }
    }

    fn set_hurried(&self, hurried: bool) {
        self.link.set_hurried(hurried);
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.link.close().await;
            Ok(())
        })
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        self.link.cut();
    }
}

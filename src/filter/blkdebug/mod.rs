//! `blkdebug`: errors on demand, and a child that takes only some requests.
//!
//! Events are what the node above tells of its work ([`Driver::debug_event`]), and writes and flushes of this
//! node itself.

mod rules;

use std::any::Any;
use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{
    Child, DebugEvent, Driver, Extent, Forward, IoFuture, Limits, Permission, Permissions, Role,
    Transfer, TruncateOptions, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;

use super::passed_limits;
use rules::Rules;

pub use rules::{InjectError, IoTypes, SetState};

/// What a node is opened with. Sizes in bytes; 0 is as the child has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// Errors.
    pub inject_error: Vec<InjectError>,
    /// Changes of the state.
    pub set_state: Vec<SetState>,
    /// Alignment of requests; a power of two.
    pub align: u64,
    /// Longest read or write.
    pub max_transfer: u64,
    /// Alignment of zeroes; others are written as data.
    pub opt_write_zero: u64,
    /// Longest request for zeroes.
    pub max_write_zero: u64,
    /// Alignment of discards; others are left out.
    pub opt_discard: u64,
    /// Longest discard.
    pub max_discard: u64,
    /// Permissions that are needed on the child, also without users.
    pub take: Permission,
    /// Permissions that others may not have on the child.
    pub unshare: Permission,
}

impl BlkdebugOptions {
    /// # Errors
    /// Sizes that do not go together, in QEMU's words.
    fn check(&self, below: &Limits) -> Result<()> {
        let most = i32::MAX as u64;
        if self.align > most || (self.align != 0 && !self.align.is_power_of_two()) {
            return Err(cannot_meet("align", self.align));
        }
        let align = self.align.max(u64::from(below.logical_block_size));
        let meets = |name, value: u64, unit: u64| {
            let fits = value == 0 || (value < most && value.is_multiple_of(unit));
            fits.then_some(()).ok_or_else(|| cannot_meet(name, value))
        };
        meets("max-transfer", self.max_transfer, align)?;
        meets("opt-write-zero", self.opt_write_zero, align)?;
        let unit = self.opt_write_zero.max(align);
        meets("max-write-zero", self.max_write_zero, unit)?;
        meets("opt-discard", self.opt_discard, align)?;
        let unit = self.opt_discard.max(align);
        meets("max-discard", self.max_discard, unit)
    }
}

fn cannot_meet(name: &str, value: u64) -> Error {
    let message = format!("Cannot meet constraints with {name} {value}");
    Error::new(ErrorKind::InvalidArgument, message)
}

/// The driver.
pub struct Blkdebug {
    handle: Handle,
    image: Rc<Child>,
    options: BlkdebugOptions,
    rules: Rules,
}

impl Blkdebug {
    /// A node over `image`; the event `none` happens.
    ///
    /// # Errors
    /// Options that do not go together, in QEMU's words.
    pub fn new(handle: &Handle, image: Rc<Child>, options: BlkdebugOptions) -> Result<Blkdebug> {
        options.check(&image.node().driver().limits())?;
        Ok(Blkdebug {
            handle: handle.clone(),
            image,
            rules: Rules::new(&options.inject_error, &options.set_state),
            options,
        })
    }

    async fn check(&self, kind: IoTypes, range: Option<ByteRange>) -> Result<()> {
        let Some((errno, immediately)) = self.rules.meet(kind, range) else {
            return Ok(());
        };
        if !immediately {
            self.handle.yield_now().await;
        }
        Err(Error::from(errno))
    }

    async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if !is_multiple(&range, self.options.opt_write_zero) {
            return Err(Error::from(Errno::EOPNOTSUPP));
        }
        for piece in pieces(range, self.options.max_write_zero) {
            self.image.write_zeroes(piece, flags).await?;
        }
        Ok(())
    }
}

/// Start and length are multiples of a unit, which may be any number; 0 is as 1.
fn is_multiple(range: &ByteRange, unit: u64) -> bool {
    unit == 0 || (range.start().is_multiple_of(unit) && range.length().is_multiple_of(unit))
}

/// The range in pieces of at most so many bytes; 0: in one.
fn pieces(range: ByteRange, most: u64) -> impl Iterator<Item = ByteRange> {
    let step = if most == 0 { range.length() } else { most };
    let starts = (range.start()..range.end()).step_by(step.max(1) as usize);
    starts.map(move |start| ByteRange::between(start, range.end().min(start + step)))
}

impl Driver for Blkdebug {
    fn driver_name(&self) -> &'static str {
        "blkdebug"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    hand_on!(image: size, truncate);

    fn limits(&self) -> Limits {
        let mut limits = passed_limits(&self.image);
        if self.options.align > 0 {
            limits.request_alignment = self.options.align as u32;
            limits.logical_block_size = limits.logical_block_size.max(self.options.align as u32);
        }
        if self.options.max_transfer > 0 {
            limits.max_transfer = limits.max_transfer.min(self.options.max_transfer as u32);
        }
        limits.native_fua = false;
        limits
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        Box::pin(async move {
            self.check(IoTypes::READ, Some(range)).await?;
            self.image.read(offset, payload).await
        })
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        Box::pin(async move {
            self.rules.happens(DebugEvent::Pwritev);
            self.check(IoTypes::WRITE, Some(range)).await?;
            self.image.write(offset, payload, flags).await?;
            self.rules.happens(DebugEvent::PwritevDone);
            Ok(())
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.rules.happens(DebugEvent::PwritevZero);
            self.check(IoTypes::WRITE_ZEROES, Some(range)).await?;
            self.zero(range, flags).await?;
            self.rules.happens(DebugEvent::PwritevDone);
            Ok(())
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(IoTypes::DISCARD, Some(range)).await?;
            if !is_multiple(&range, self.options.opt_discard) {
                return Err(Error::from(Errno::EOPNOTSUPP));
            }
            for piece in pieces(range, self.options.max_discard) {
                self.image.discard(piece).await?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.rules.happens(DebugEvent::FlushToOs);
            self.rules.happens(DebugEvent::FlushToDisk);
            self.check(IoTypes::FLUSH, None).await?;
            self.image.flush().await
        })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(async move {
            self.check(IoTypes::BLOCK_STATUS, Some(range)).await?;
            self.image.block_status(range).await
        })
    }

    /// Where nothing is asked for. With an alignment of its own, the node must see all writes.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let passes = self.rules.are_none() && self.options.align <= 1;
        passes.then(|| Forward {
            child: self.image.clone(),
            offset: transfer.offset,
            guard: None,
        })
    }

    fn debug_event(&self, event: DebugEvent) {
        self.rules.happens(event);
    }

    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        assert!(role == Role::Image, "blkdebug has no {} child", role.name());
        Permissions {
            required: users.required | self.options.take,
            shared: users.shared - self.options.unshare,
        }
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move { self.image.flush().await })
    }
}

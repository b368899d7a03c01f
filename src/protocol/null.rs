//! `null-co` and `null-aio`: a node that stores nothing, for measurements and tests.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::block::{
    Driver, Extent, ExtentKind, IoFuture, Limits, Permissions, Role, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;

/// What a null node is opened with.
#[derive(Clone, Copy, Debug)]
pub struct NullOptions {
    /// `null-co` or `null-aio`: one and the same here, but queries tell what was asked for.
    pub driver_name: &'static str,
    /// Bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// Each request takes at least this long.
    pub latency: Duration,
    /// Reads fill the payload with zeroes; otherwise they leave in it what was there.
    pub read_zeroes: bool,
}

/// The driver.
pub struct Null {
    handle: Handle,
    options: NullOptions,
    size: u64,
}

impl Null {
    /// Opens nothing.
    ///
    /// # Errors
    /// A size beyond 2^63 - 512.
    pub fn open(handle: &Handle, options: NullOptions) -> Result<Null> {
        let size = options.size.checked_next_multiple_of(512);
        let Some(size) = size.filter(|size| i64::try_from(*size).is_ok()) else {
            let message = format!("Size {} of a null node is too large", options.size);
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        };
        Ok(Null {
            handle: handle.clone(),
            options,
            size,
        })
    }

    async fn wait(&self) {
        if !self.options.latency.is_zero() {
            self.handle.sleep(self.options.latency).await;
        }
    }

    fn done(&self) -> IoFuture<'_, ()> {
        if self.options.latency.is_zero() {
            return Box::pin(Done);
        }
        Box::pin(async {
            self.wait().await;
            Ok(())
        })
    }
}

/// Is ready. It has no size, so that its box allocates nothing.
struct Done;

impl Future for Done {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Driver for Null {
    fn driver_name(&self) -> &'static str {
        self.options.driver_name
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits {
            native_fua: true,
            ..Limits::default()
        }
    }

    fn read(&self, _offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        if !self.options.read_zeroes {
            return self.done();
        }
        Box::pin(async move {
            self.wait().await;
            payload.fill_zero()
        })
    }

    fn write(&self, _offset: u64, _payload: Payload, _flags: WriteFlags) -> IoFuture<'_, ()> {
        self.done()
    }

    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_, ()> {
        self.done()
    }

    fn discard(&self, _range: ByteRange) -> IoFuture<'_, ()> {
        self.done()
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.done()
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        let host_offset = Some(range.start());
        let kind = if self.options.read_zeroes {
            ExtentKind::Zero { host_offset }
        } else {
            ExtentKind::Data {
                host_offset,
                compressed: false,
            }
        };
        let length = range.length();
        Box::pin(async move { Ok(Extent { length, kind }) })
    }

    fn child_permissions(&self, role: Role, _users: Permissions, _writable: bool) -> Permissions {
        unreachable!("a null node has no {} child", role.name())
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::MemorySlice;
    use crate::runtime::Runtime;

    const OPTIONS: NullOptions = NullOptions {
        driver_name: "null-co",
        size: 1000,
        latency: Duration::from_millis(20),
        read_zeroes: true,
    };

    #[test]
    fn requests_take_the_latency_and_read_zeroes() {
        let runtime = Runtime::simulated(1).expect("runtime");
        let handle = runtime.handle();
        let null = Null::open(&handle, OPTIONS).expect("open");
        assert_eq!(null.size(), 1024);
        let payload = MemorySlice::from_bytes(&[1; 512]);
        let begin = handle.now();
        runtime
            .block_on(null.read(0, payload.clone().into()))
            .expect("read");
        assert!(payload.is_zero());
        assert!(handle.now() >= begin + OPTIONS.latency);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let runtime = Runtime::simulated(1).expect("runtime");
        let options = NullOptions {
            size: u64::MAX,
            ..OPTIONS
        };
        assert!(Null::open(&runtime.handle(), options).is_err());
    }
}

//! One request between its fetch and its answer.

use nix::errno::Errno;

use super::abi::{Description, Operation};
use crate::block::{Child, WriteFlags, ZeroFlags};
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// A request that must be answered exactly once: dropping it unanswered is a bug.
pub(super) struct Request {
    description: Description,
    answered: bool,
}

impl Request {
    pub(super) fn new(description: Description) -> Request {
        Request {
            description,
            answered: false,
        }
    }

    /// The request moves bytes of this many; `None` where it carries none.
    pub(super) fn data_length(&self) -> Option<usize> {
        match self.description.operation {
            Operation::Read | Operation::Write => Some(self.description.length as usize),
            _ => None,
        }
    }

    pub(super) fn description(&self) -> &Description {
        &self.description
    }

    /// What the kernel is told: bytes moved, 0 for requests without data, or a negative errno.
    pub(super) fn answer(mut self, result: Result<()>) -> i32 {
        self.answered = true;
        match result {
            Ok(()) => self.data_length().unwrap_or(0) as i32,
            Err(error) => {
                tracing::warn!(request = ?self.description, %error, "request failed");
                -(error.errno() as i32)
            }
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        assert!(
            self.answered || std::thread::panicking(),
            "{:?} was dropped unanswered",
            self.description
        );
    }
}

/// Carries a request out; a request with data has a payload of its length.
pub(super) async fn serve(
    child: &Child,
    request: &Description,
    payload: Option<Payload>,
) -> Result<()> {
    match (request.operation, payload) {
        (Operation::Read, Some(payload)) => child.read(request.offset, payload).await,
        (Operation::Write, Some(payload)) => {
            let mut flags = WriteFlags::empty();
            flags.set(WriteFlags::FUA, request.fua);
            child.write(request.offset, payload, flags).await
        }
        (Operation::Flush, _) => child.flush().await,
        (Operation::Discard, _) => child.discard(range(request)?).await,
        (Operation::WriteZeroes, _) => {
            let mut flags = ZeroFlags::empty();
            flags.set(ZeroFlags::FUA, request.fua);
            flags.set(ZeroFlags::MAY_UNMAP, !request.no_unmap);
            child.write_zeroes(range(request)?, flags).await
        }
        (Operation::Other(_), _) => Err(Error::from(Errno::EOPNOTSUPP)),
        (Operation::Read | Operation::Write, None) => {
            unreachable!("a data request without payload")
        }
    }
}

fn range(request: &Description) -> Result<ByteRange> {
    ByteRange::new(request.offset, request.length).ok_or_else(|| Error::from(Errno::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(length: u64) -> Request {
        Request::new(Description {
            operation: Operation::Write,
            offset: 0,
            length,
            fua: false,
            no_unmap: false,
            unregistered: false,
        })
    }

    #[test]
    fn answers_are_bytes_or_an_errno() {
        assert_eq!(write(4096).answer(Ok(())), 4096);
        let full = Error::from(Errno::ENOSPC);
        assert_eq!(write(4096).answer(Err(full)), -libc::ENOSPC);
        let mut flush = write(0);
        flush.description.operation = Operation::Flush;
        assert_eq!(flush.answer(Ok(())), 0);
    }

    #[test]
    #[should_panic(expected = "dropped unanswered")]
    fn an_unanswered_request_is_noticed() {
        drop(write(512));
    }
}

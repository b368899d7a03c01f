//! Reads and writes: one submission, and what a short one needs.

use nix::errno::Errno;

use crate::block::WriteFlags;
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::range::align_down;
use crate::runtime::ring;

use super::File;

impl File {
    /// Fills the payload; past the end of the file with zeroes.
    pub(super) async fn read_all(&self, offset: u64, payload: Payload) -> Result<()> {
        let file = self.descriptor().ring_file();
        let read = self.handle.ring().read_at(&file, offset, payload.clone());
        let done = read
            .await
            .map_err(|error| self.describe("read", offset, error))?;
        if done == payload.length() {
            return Ok(());
        }
        self.read_rest(offset, payload, done).await
    }

    /// Goes on after a short read, until the end of the file or of the payload.
    async fn read_rest(&self, offset: u64, payload: Payload, first: usize) -> Result<()> {
        let (mut from, mut done) = (0, first);
        while done < payload.length() {
            let next = self.resume_at(done);
            // No block was read since the last time: the file ends here, whatever its size was before.
            if next <= from || offset + done as u64 >= self.length.get() {
                return payload.slice(done, payload.length() - done).fill_zero();
            }
            from = next;
            let rest = payload.slice(from, payload.length() - from);
            let at = offset + from as u64;
            let file = self.descriptor().ring_file();
            let read = self.handle.ring().read_at(&file, at, rest);
            done = from
                + read
                    .await
                    .map_err(|error| self.describe("read", at, error))?;
        }
        Ok(())
    }

    /// Writes all of the payload.
    pub(super) async fn write_all(
        &self,
        offset: u64,
        payload: Payload,
        flags: WriteFlags,
    ) -> Result<()> {
        let how = if flags.contains(WriteFlags::FUA) && !self.no_flush.get() {
            ring::WriteFlags::DSYNC
        } else {
            ring::WriteFlags::empty()
        };
        let length = payload.length();
        let mut done = 0;
        loop {
            let at = offset + done as u64;
            let rest = if done == 0 {
                payload.clone()
            } else {
                payload.slice(done, length - done)
            };
            let file = self.descriptor().ring_file();
            let write = self.handle.ring().write_at(&file, at, rest, how);
            let written = write.await;
            // Also a failed write may have written something.
            self.count_change();
            let written = written.map_err(|error| self.describe("write", at, error))?;
            let end = self.resume_at(done + written);
            if end <= done && done + written < length {
                let error = Error::from(Errno::ENOSPC);
                return Err(self.describe("write", at, error));
            }
            done += written;
            self.written_to(offset + done as u64);
            if done >= length {
                return Ok(());
            }
            done = end;
        }
    }

    /// Direct I/O goes on at a multiple of its alignment.
    fn resume_at(&self, done: usize) -> usize {
        align_down(done as u64, u64::from(self.alignment.get().request)) as usize
    }

    pub(super) fn describe(&self, what: &str, offset: u64, error: Error) -> Error {
        error.context(format!("{what} of '{}' at {offset:#x}", self.filename))
    }
}

//! One client's socket: buffered input, whole messages out.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::socket::{self, sockopt};

use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::runtime::Handle;
use crate::runtime::ring::RingFile;
use crate::runtime::sync::Mutex;

/// Bytes received at once, if they are not the payload of a large write.
const RECEIVE_BYTES: usize = 64 << 10;

/// A connected socket. Both directions are used through it; requests that answer take turns.
pub(super) struct Socket {
    handle: Handle,
    file: Rc<RingFile>,
    sending: Mutex<()>,
    dead: Cell<bool>,
}

impl Socket {
    /// Take over an accepted connection.
    pub(super) fn new(handle: Handle, descriptor: OwnedFd) -> Self {
        // Not a TCP socket, or not settable: slower at worst.
        let _ = socket::setsockopt(&descriptor, sockopt::TcpNoDelay, &true);
        let file = handle.ring().file(descriptor);
        Self {
            handle,
            file,
            sending: Mutex::new(()),
            dead: Cell::new(false),
        }
    }

    /// Send all parts of a message, with nothing between them. After a failure the connection is of no use: everything
    /// later fails, too, and the reading side sees the end.
    pub(super) async fn send(&self, parts: &[MemorySlice]) -> Result<()> {
        let _turn = self.sending.lock().await;
        for part in parts {
            if let Err(error) = self.send_part(part).await {
                self.shut_down();
                return Err(error);
            }
        }
        Ok(())
    }

    async fn send_part(&self, part: &MemorySlice) -> Result<()> {
        let mut sent = 0;
        while sent < part.length() {
            let rest = part.slice(sent, part.length() - sent);
            sent += self.handle.ring().send(&self.file, rest).await?;
        }
        Ok(())
    }

    /// Receive into `buffer`, as much as there is; 0 at the end.
    async fn receive(&self, buffer: MemorySlice) -> Result<usize> {
        if self.dead.get() {
            return Ok(0);
        }
        self.handle.ring().recv(&self.file, buffer).await
    }

    /// End both directions at once: whoever waits for the socket goes on.
    pub(super) fn shut_down(&self) {
        self.dead.set(true);
        // Already disconnected is as good.
        let _ = socket::shutdown(self.file.as_fd().as_raw_fd(), socket::Shutdown::Both);
    }
}

/// The input of a socket.
pub(super) struct Input {
    socket: Rc<Socket>,
    buffer: MemorySlice,
    start: usize,
    end: usize,
}

impl Input {
    /// Nothing received yet.
    pub(super) fn new(socket: Rc<Socket>) -> Self {
        Self {
            socket,
            buffer: MemorySlice::zeroed(RECEIVE_BYTES),
            start: 0,
            end: 0,
        }
    }

    /// Copy out what is there, at most `window`, without taking it.
    pub(super) fn peek<'a>(&self, window: &'a mut [u8]) -> &'a [u8] {
        let length = window.len().min(self.end - self.start);
        self.buffer.copy_out(self.start, &mut window[..length]);
        &window[..length]
    }

    /// Take bytes that were seen.
    pub(super) fn take(&mut self, length: usize) {
        assert!(length <= self.end - self.start, "taking more than there is");
        self.start += length;
    }

    /// Wait for more, once everything was taken; false at the end of the stream.
    pub(super) async fn fill(&mut self) -> Result<bool> {
        assert!(self.start == self.end, "input is not used up");
        let received = self.socket.receive(self.buffer.clone()).await?;
        (self.start, self.end) = (0, received);
        Ok(received > 0)
    }

    /// Put back bytes at the front of an input that is used up.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        assert!(
            self.start == self.end && bytes.len() <= self.buffer.length(),
            "no room"
        );
        self.buffer.copy_in(0, bytes);
        (self.start, self.end) = (0, bytes.len());
    }

    /// Fill `target` from the stream; false if that ends before.
    pub(super) async fn read_exact(&mut self, target: &MemorySlice) -> Result<bool> {
        let mut filled = target.length().min(self.end - self.start);
        target.copy_from(0, &self.buffer.slice(self.start, filled));
        self.start += filled;
        while filled < target.length() {
            let rest = target.slice(filled, target.length() - filled);
            match self.socket.receive(rest).await? {
                0 => return Ok(false),
                received => filled += received,
            }
        }
        Ok(true)
    }
}

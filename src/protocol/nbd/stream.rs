//! A connection's bytes: handshake, buffered input, whole messages out.

use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket;

use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::nbd::{ClientHandshake, ClientStep, Terms};
use crate::runtime::Handle;
use crate::runtime::ring::RingFile;

use super::address::NbdAddress;

/// Bytes received at once, if they are not the data of a large read.
const RECEIVE_BYTES: usize = 64 << 10;
/// Bytes of the handshake that are looked at together.
const WINDOW: usize = 4096;

/// A connected socket.
#[derive(Clone)]
pub(super) struct Stream {
    handle: Handle,
    file: Rc<RingFile>,
}

impl Stream {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// Nobody is there, or no terms were found.
    pub(super) async fn open(
        handle: &Handle,
        address: &NbdAddress,
        export: &str,
    ) -> Result<(Stream, Terms)> {
        let file = address.connect(handle).await?;
        let stream = Stream {
            handle: handle.clone(),
            file,
        };
        let terms = stream.shake_hands(export).await?;
        Ok((stream, terms))
    }

    async fn shake_hands(&self, export: &str) -> Result<Terms> {
        let mut handshake = ClientHandshake::new(export);
        let window = MemorySlice::zeroed(WINDOW);
        loop {
            let step = handshake.step()?;
            let output = handshake.take_output();
            if !output.is_empty() {
                self.send(&MemorySlice::from_bytes(&output)).await?;
            }
            match step {
                ClientStep::Enter(terms) => return Ok(terms),
                ClientStep::Proceed => {}
                ClientStep::Receive => {
                    let received = self.receive(window.clone()).await?;
                    handshake.input(&window.slice(0, received).to_vec());
                }
            }
        }
    }

    /// Sends all of it.
    pub(super) async fn send(&self, message: &MemorySlice) -> Result<()> {
        let mut sent = 0;
        while sent < message.length() {
            let rest = message.slice(sent, message.length() - sent);
            sent += self.handle.ring().send(&self.file, rest).await?;
        }
        Ok(())
    }

    /// What has arrived; at least a byte.
    async fn receive(&self, buffer: MemorySlice) -> Result<usize> {
        match self.handle.ring().recv(&self.file, buffer).await? {
            0 => {
                let message = "The NBD server has closed the connection";
                Err(Error::from_errno(Errno::EIO, message))
            }
            received => Ok(received),
        }
    }

    /// Ends both directions at once: whoever waits for the connection goes on.
    pub(super) fn shut_down(&self) {
        // Already disconnected is as good.
        let _ = socket::shutdown(self.file.as_fd().as_raw_fd(), socket::Shutdown::Both);
    }

    /// The same connection.
    pub(super) fn is(&self, other: &Stream) -> bool {
        Rc::ptr_eq(&self.file, &other.file)
    }
}

/// The input of a stream after the handshake.
pub(super) struct Input {
    stream: Stream,
    buffer: MemorySlice,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new(stream: Stream) -> Input {
        Input {
            stream,
            buffer: MemorySlice::zeroed(RECEIVE_BYTES),
            start: 0,
            end: 0,
        }
    }

    /// Fills the memory; what is not here yet is received into it.
    pub(super) async fn read(&mut self, target: &MemorySlice) -> Result<()> {
        let mut filled = target.length().min(self.end - self.start);
        target.copy_from(0, &self.buffer.slice(self.start, filled));
        self.start += filled;
        while filled < target.length() {
            let rest = target.slice(filled, target.length() - filled);
            filled += self.stream.receive(rest).await?;
        }
        Ok(())
    }

    /// Fills the bytes, by way of the buffer.
    pub(super) async fn read_bytes(&mut self, target: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        loop {
            let length = (target.len() - filled).min(self.end - self.start);
            let bytes = &mut target[filled..filled + length];
            self.buffer.copy_out(self.start, bytes);
            self.start += length;
            filled += length;
            if filled == target.len() {
                return Ok(());
            }
            self.end = self.stream.receive(self.buffer.clone()).await?;
            self.start = 0;
        }
    }
}

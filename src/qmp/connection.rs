//! A stream of bytes to and from one client, over the runtime's ring.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::poll::PollFlags;

use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::runtime::Handle;
use crate::runtime::ring::{RingFile, WriteFlags};

/// Bytes read at a time.
const CHUNK: usize = 16 << 10;

/// "At the file's own position", for files that have one.
const CURRENT_POSITION: u64 = u64::MAX;

/// Two ends of a conversation; one and the same for a socket.
pub(super) struct Connection {
    handle: Handle,
    kind: Kind,
}

enum Kind {
    Socket(Rc<RingFile>),
    Files {
        input: Rc<RingFile>,
        output: Rc<RingFile>,
    },
}

impl Connection {
    pub(super) fn socket(handle: &Handle, socket: OwnedFd) -> Connection {
        Connection {
            handle: handle.clone(),
            kind: Kind::Socket(handle.ring().file(socket)),
        }
    }

    pub(super) fn files(handle: &Handle, input: OwnedFd, output: OwnedFd) -> Connection {
        let file = |descriptor| handle.ring().file(descriptor);
        Connection {
            handle: handle.clone(),
            kind: Kind::Files {
                input: file(input),
                output: file(output),
            },
        }
    }

    /// Bytes that have arrived; none at the end.
    pub(super) async fn read(&self) -> Result<Vec<u8>> {
        let buffer = MemorySlice::zeroed(CHUNK);
        let ring = self.handle.ring();
        let length = match &self.kind {
            Kind::Socket(socket) => ring.recv(socket, buffer.clone()).await?,
            Kind::Files { input, .. } => {
                // Standard input may have been made non-blocking by whoever shares it.
                ring.poll_add(input, PollFlags::POLLIN).await?;
                let payload = Payload::Memory(buffer.clone());
                ring.read_at(input, CURRENT_POSITION, payload).await?
            }
        };
        Ok(buffer.slice(0, length).to_vec())
    }

    /// Sends all of the bytes.
    pub(super) async fn write_all(&self, bytes: &[u8]) -> Result<()> {
        let mut rest = MemorySlice::from_bytes(bytes);
        while rest.length() > 0 {
            let sent = self.write(rest.clone()).await?;
            rest = rest.slice(sent, rest.length() - sent);
        }
        Ok(())
    }

    async fn write(&self, bytes: MemorySlice) -> Result<usize> {
        let ring = self.handle.ring();
        match &self.kind {
            Kind::Socket(socket) => ring.send(socket, bytes).await,
            Kind::Files { output, .. } => {
                ring.poll_add(output, PollFlags::POLLOUT).await?;
                let payload = Payload::Memory(bytes);
                let flags = WriteFlags::empty();
                ring.write_at(output, CURRENT_POSITION, payload, flags)
                    .await
            }
        }
    }
}

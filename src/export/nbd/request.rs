//! Requests, carried out on the node.

use std::rc::Rc;

use crate::block::{Child, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::nbd::{Command, ErrorCode, ReplyTo, ReplyWriter, Request, SelectedContext};
use crate::range::ByteRange;

use super::export::NbdExport;
use super::payload::Payload;
use super::read;
use super::server::Shared;
use super::socket::Socket;
use super::status;

/// Bytes that CACHE reads at once.
const CACHE_STEP: u64 = 256 << 10;

/// What the requests of one client share.
pub(super) struct Connection {
    pub(super) shared: Rc<Shared>,
    pub(super) writer: ReplyWriter,
    pub(super) contexts: Vec<SelectedContext>,
    pub(super) socket: Rc<Socket>,
    pub(super) export: Rc<NbdExport>,
}

impl Connection {
    /// Memory for `length` bytes of data. Its content is unspecified.
    pub(super) fn payload(&self, length: usize) -> Payload {
        self.shared.payloads.take(length)
    }

    /// The edge to the exported node.
    pub(super) fn root(&self) -> &Rc<Child> {
        self.export.root()
    }

    /// Send a reply or a chunk of one. A client that cannot be reached is noticed by who reads from it.
    pub(super) async fn send(&self, message: MemorySlice) {
        if let Err(error) = self.socket.send(&[message]).await {
            tracing::debug!(%error, "NBD reply not sent");
        }
    }

    /// Send an error reply.
    pub(super) async fn fail(&self, to: ReplyTo, error: &Error) {
        tracing::debug!(export = self.export.id(), %error, "NBD request failed");
        let reply = self
            .writer
            .error(to, ErrorCode::from(error), error.message());
        self.send(MemorySlice::from_bytes(&reply)).await;
    }
}

/// Carry out a request and answer it. Writes come with their data.
pub(super) async fn perform(connection: &Connection, request: Request, payload: Option<Payload>) {
    let to = ReplyTo::from(&request);
    let result = match &request.command {
        Command::Read { dont_fragment } => {
            return read::read(connection, &request, *dont_fragment).await;
        }
        Command::BlockStatus { one, contexts } => {
            return status::block_status(connection, &request, *one, contexts).await;
        }
        Command::Write => write(connection, &request, payload).await,
        Command::Flush => connection.root().flush().await,
        Command::Trim => trim(connection, &request).await,
        Command::Cache => cache(connection, &request).await,
        Command::WriteZeroes { no_hole, fast } => {
            write_zeroes(connection, &request, *no_hole, *fast).await
        }
    };
    match result {
        Ok(()) => {
            connection
                .send(MemorySlice::from_bytes(&connection.writer.done(to)))
                .await
        }
        Err(error) => connection.fail(to, &error).await,
    }
}

impl Connection {
    fn is_durable(&self, request: &Request) -> bool {
        request.fua || self.export.is_writethrough()
    }
}

async fn write(connection: &Connection, request: &Request, payload: Option<Payload>) -> Result<()> {
    let Some(payload) = payload else {
        unreachable!("a write comes with its data")
    };
    let mut flags = WriteFlags::empty();
    flags.set(WriteFlags::FUA, connection.is_durable(request));
    connection
        .root()
        .write(request.offset, payload.data().into(), flags)
        .await
}

async fn trim(connection: &Connection, request: &Request) -> Result<()> {
    if request.length > 0 {
        connection.root().discard(range(request)).await?;
    }
    if connection.is_durable(request) {
        connection.root().flush().await
    } else {
        Ok(())
    }
}

async fn write_zeroes(
    connection: &Connection,
    request: &Request,
    no_hole: bool,
    fast: bool,
) -> Result<()> {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::FUA, connection.is_durable(request));
    flags.set(ZeroFlags::MAY_UNMAP, !no_hole);
    flags.set(ZeroFlags::NO_FALLBACK, fast);
    connection.root().write_zeroes(range(request), flags).await
}

/// Read the range for what reading does on the way: fill caches, copy on read.
async fn cache(connection: &Connection, request: &Request) -> Result<()> {
    let (mut offset, end) = (request.offset, request.offset + request.length);
    while offset < end {
        let length = CACHE_STEP.min(end - offset);
        let payload = connection.payload(length as usize);
        connection
            .root()
            .read(offset, payload.data().into())
            .await?;
        offset += length;
    }
    Ok(())
}

/// The bytes a request is about; inside the export, so they do not wrap.
fn range(request: &Request) -> ByteRange {
    ByteRange::between(request.offset, request.offset + request.length)
}

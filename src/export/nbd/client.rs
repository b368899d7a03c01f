//! One client: handshake, then requests until it leaves.

use std::rc::Rc;

use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::nbd::{
    CloseReason, Command, Handshake, Incoming, ReplyTo, ReplyWriter, Request, RequestReader,
    Session, Step,
};
use crate::runtime::sync::Semaphore;

use super::export::NbdExport;
use super::payload::Payload;
use super::request::{Connection, perform};
use super::server::Shared;
use super::socket::{Input, Socket};
use super::{MAX_REQUEST_BYTES, MAX_REQUESTS};

/// Bytes of the input that are looked at together.
const WINDOW: usize = 1024;

/// Serve a client until it leaves, misbehaves, or its socket is shut down.
pub(super) async fn serve(shared: &Rc<Shared>, socket: &Rc<Socket>) {
    let mut input = Input::new(socket.clone());
    let handshake = shake_hands(shared, socket, &mut input);
    let outcome = match shared.handshake_limit {
        Some(limit) => match shared.handle.timeout(limit, handshake).await {
            Ok(outcome) => outcome,
            Err(_) => {
                tracing::debug!("NBD client took too long for its handshake");
                return;
            }
        },
        None => handshake.await,
    };
    match outcome {
        Ok(Some((session, export))) => transmit(shared, socket, input, session, export).await,
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "NBD client lost during its handshake"),
    }
}

/// Negotiate. No session if the client left or was thrown out.
async fn shake_hands(
    shared: &Rc<Shared>,
    socket: &Rc<Socket>,
    input: &mut Input,
) -> Result<Option<(Session, Rc<NbdExport>)>> {
    let mut handshake = Handshake::new();
    loop {
        let step = handshake.step(&**shared);
        // The export is looked up in the same breath as the decision, before anything can change.
        let export = match &step {
            Step::Enter(session) => shared.find(&session.export),
            _ => None,
        };
        let output = handshake.take_output();
        if !output.is_empty() {
            socket.send(&[MemorySlice::from_bytes(&output)]).await?;
        }
        match step {
            Step::Answered => {}
            Step::Receive => {
                if !receive(input, &mut handshake).await? {
                    return Ok(None);
                }
            }
            Step::Enter(session) => {
                input.put_back(&handshake.into_rest());
                return Ok(export.map(|export| (session, export)));
            }
            Step::Close(reason) => {
                log_close(reason);
                return Ok(None);
            }
        }
    }
}

async fn receive(input: &mut Input, handshake: &mut Handshake) -> Result<bool> {
    if !input.fill().await? {
        return Ok(false);
    }
    let mut window = [0; WINDOW];
    loop {
        let bytes = input.peek(&mut window);
        if bytes.is_empty() {
            return Ok(true);
        }
        let length = bytes.len();
        handshake.input(bytes);
        input.take(length);
    }
}

fn log_close(reason: CloseReason) {
    match reason {
        CloseReason::Aborted => {}
        CloseReason::UnknownExport => tracing::debug!("NBD client asked for an unknown export"),
        CloseReason::Violation(what) => {
            tracing::debug!(what, "NBD client broke the protocol in its handshake");
        }
    }
}

/// The transmission phase: ends when every request that was read is answered.
async fn transmit(
    shared: &Rc<Shared>,
    socket: &Rc<Socket>,
    mut input: Input,
    session: Session,
    export: Rc<NbdExport>,
) {
    let _guard = export.enter(socket);
    let connection = Rc::new(Connection {
        shared: shared.clone(),
        writer: ReplyWriter::new(session.mode),
        contexts: session.contexts.clone(),
        socket: socket.clone(),
        export,
    });
    let slots = Rc::new(Semaphore::new(MAX_REQUESTS));
    let room = Rc::new(Semaphore::new(MAX_REQUEST_BYTES));
    let mut reader = RequestReader::new(session);
    loop {
        let slot = slots.acquire_owned(1).await;
        let request = match next_request(&connection, &mut reader, &mut input).await {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "NBD client lost");
                break;
            }
        };
        let space = room.acquire_owned(data_length(&request)).await;
        let Some(payload) = receive_payload(&connection, &request, &mut input).await else {
            break;
        };
        let connection = connection.clone();
        let task = async move {
            perform(&connection, request, payload).await;
            drop((slot, space));
        };
        shared.handle.spawn(task).detach();
    }
    let _all = slots.acquire(MAX_REQUESTS).await;
}

/// The next request to carry out; what is refused is answered here. None when the client leaves.
async fn next_request(
    connection: &Connection,
    reader: &mut RequestReader,
    input: &mut Input,
) -> Result<Option<Request>> {
    let mut window = [0; WINDOW];
    loop {
        let bytes = input.peek(&mut window);
        if bytes.is_empty() {
            if !input.fill().await? {
                return Ok(None);
            }
            continue;
        }
        let (taken, incoming) = reader.read(bytes);
        input.take(taken);
        match incoming {
            None => {}
            Some(Incoming::Request(request)) => return Ok(Some(request)),
            Some(Incoming::Refused {
                cookie,
                offset,
                error,
                text,
            }) => {
                let to = ReplyTo { cookie, offset };
                let reply = connection.writer.error(to, error, text);
                connection
                    .socket
                    .send(&[MemorySlice::from_bytes(&reply)])
                    .await?;
            }
            Some(Incoming::Disconnect) => return Ok(None),
            Some(Incoming::Violation(what)) => {
                tracing::debug!(what, "NBD client broke the protocol");
                return Ok(None);
            }
        }
    }
}

/// Bytes of data that a request keeps in memory.
fn data_length(request: &Request) -> usize {
    match request.command {
        Command::Read { .. } | Command::Write => request.length as usize,
        _ => 0,
    }
}

/// The data of a write; nothing for others. None if the stream ends before.
async fn receive_payload(
    connection: &Connection,
    request: &Request,
    input: &mut Input,
) -> Option<Option<Payload>> {
    if request.command != Command::Write {
        return Some(None);
    }
    let payload = connection.payload(request.length as usize);
    match input.read_exact(&payload.data()).await {
        Ok(true) => Some(Some(payload)),
        Ok(false) => None,
        Err(error) => {
            tracing::debug!(%error, "NBD client lost in the middle of a write");
            None
        }
    }
}

//! Requests of the transmission phase, found in the stream.

use super::errno::ErrorCode;
use super::protocol::{CommandFlags, MAX_PAYLOAD, ReplyMode, cmd};
use super::request::{RawRequest, Refusal, Request};
use super::session::Session;

/// Bytes of a compact request's header.
const COMPACT_HEADER: usize = 28;
/// Bytes of an extended request's header.
const EXTENDED_HEADER: usize = 32;
/// Most contexts a payload of BLOCK_STATUS may name.
const MAX_STATUS_IDS: usize = 64;

/// What was found in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A request to carry out. The payload of a write follows and is the caller's to take from the stream.
    Request(Request),
    /// A request that is answered with an error; its payload has been or will be skipped by the reader.
    Refused {
        /// The client's mark.
        cookie: u64,
        /// The request's offset, which extended replies repeat.
        offset: u64,
        /// The error value.
        error: ErrorCode,
        /// A text for people.
        text: &'static str,
    },
    /// The client takes its leave: finish what is in flight and close.
    Disconnect,
    /// The client lost the framing of the stream: close.
    Violation(&'static str),
}

/// Finds requests in the stream of one connection.
#[derive(Debug)]
pub struct RequestReader {
    session: Session,
    header: Vec<u8>,
    state: State,
}

#[derive(Debug)]
enum State {
    Header,
    /// Bytes of a payload nobody wants.
    Skip(u64),
    /// The payload of BLOCK_STATUS.
    StatusPayload {
        raw: RawRequest,
        payload: Vec<u8>,
    },
    /// Nothing more is read.
    Ended,
}

impl RequestReader {
    /// A reader for a connection that has just entered the transmission phase.
    pub fn new(session: Session) -> Self {
        Self {
            session,
            header: Vec::with_capacity(EXTENDED_HEADER),
            state: State::Header,
        }
    }

    /// What was agreed on.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Take bytes from the front of `input` until something is found or the input is used up; tells how many were
    /// taken. After a write was found, its payload is not for this function.
    pub fn read(&mut self, input: &[u8]) -> (usize, Option<Incoming>) {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            let (used, incoming) = self.advance(rest);
            taken += used;
            if incoming.is_some() || taken == input.len() {
                return (taken, incoming);
            }
        }
    }

    fn advance(&mut self, input: &[u8]) -> (usize, Option<Incoming>) {
        match &mut self.state {
            State::Header => self.advance_header(input),
            State::Skip(remaining) => {
                let used = usize::try_from(*remaining)
                    .unwrap_or(usize::MAX)
                    .min(input.len());
                *remaining -= used as u64;
                if *remaining == 0 {
                    self.state = State::Header;
                }
                (used, None)
            }
            State::StatusPayload { raw, payload } => {
                let raw = *raw;
                let used = fill(payload, raw.length as usize, input);
                if payload.len() < raw.length as usize {
                    return (used, None);
                }
                let payload = std::mem::take(payload);
                self.state = State::Header;
                (used, Some(self.status_with_payload(raw, &payload)))
            }
            State::Ended => (input.len(), None),
        }
    }

    fn advance_header(&mut self, input: &[u8]) -> (usize, Option<Incoming>) {
        let length = match self.session.mode {
            ReplyMode::Extended => EXTENDED_HEADER,
            ReplyMode::Simple | ReplyMode::Structured => COMPACT_HEADER,
        };
        let used = fill(&mut self.header, length, input);
        if self.header.len() < length {
            return (used, None);
        }
        let raw = RawRequest::decode(&self.header, self.session.mode);
        self.header.clear();
        let incoming = match raw {
            Some(raw) => self.request(raw),
            None => Some(Incoming::Violation("wrong magic of a request")),
        };
        if matches!(
            incoming,
            Some(Incoming::Disconnect | Incoming::Violation(_))
        ) {
            self.state = State::Ended;
        }
        (used, incoming)
    }

    /// Decide on a header. Nothing is found yet if a payload must be seen first.
    fn request(&mut self, raw: RawRequest) -> Option<Incoming> {
        if raw.kind == cmd::DISC {
            return Some(Incoming::Disconnect);
        }
        let payload = self.payload_length(&raw);
        if payload > u64::from(MAX_PAYLOAD) {
            return Some(Incoming::Violation(
                "payload is longer than the maximum block size",
            ));
        }
        if raw.kind == cmd::BLOCK_STATUS && payload > 0 {
            if payload <= (8 + 4 * MAX_STATUS_IDS) as u64 {
                self.state = State::StatusPayload {
                    raw,
                    payload: Vec::new(),
                };
                return None;
            }
            self.state = State::Skip(payload);
            return Some(refused(
                &raw,
                (ErrorCode::Invalid, "too many metadata contexts"),
            ));
        }
        match raw.check(&self.session) {
            Ok(request) => Some(Incoming::Request(request)),
            Err(refusal) => {
                if payload > 0 {
                    self.state = State::Skip(payload);
                }
                Some(refused(&raw, refusal))
            }
        }
    }

    /// Bytes that follow the header.
    fn payload_length(&self, raw: &RawRequest) -> u64 {
        let has_payload = raw.kind == cmd::WRITE
            || self.session.mode == ReplyMode::Extended
                && raw.flags & CommandFlags::PAYLOAD_LEN.bits() != 0;
        if has_payload { raw.length } else { 0 }
    }

    fn status_with_payload(&self, raw: RawRequest, payload: &[u8]) -> Incoming {
        match raw.check_status(&self.session, payload) {
            Ok(request) => Incoming::Request(request),
            Err(refusal) => refused(&raw, refusal),
        }
    }
}

fn refused(raw: &RawRequest, (error, text): Refusal) -> Incoming {
    Incoming::Refused {
        cookie: raw.cookie,
        offset: raw.offset,
        error,
        text,
    }
}

/// Move bytes from `input` to `buffer` until that has `length`; tells how many.
fn fill(buffer: &mut Vec<u8>, length: usize, input: &[u8]) -> usize {
    let used = (length - buffer.len()).min(input.len());
    buffer.extend_from_slice(&input[..used]);
    used
}

#[cfg(test)]
#[path = "request_reader_tests.rs"]
mod tests;

//! Requests of the transmission phase: read from the stream and checked.

use super::errno::ErrorCode;
use super::protocol::{
    CommandFlags, EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, ReplyMode, TransmissionFlags,
    cmd,
};
use super::session::Session;

/// Bytes of a compact request's header.
const COMPACT_HEADER: usize = 28;
/// Bytes of an extended request's header.
const EXTENDED_HEADER: usize = 32;
/// Most contexts a payload of BLOCK_STATUS may name.
const MAX_STATUS_IDS: usize = 64;

/// A request within the bounds, permissions and flags of its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's mark, repeated in every reply.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// First byte.
    pub offset: u64,
    /// Bytes; may be zero, except for BLOCK_STATUS.
    pub length: u64,
    /// Answer only when what was written is durable.
    pub fua: bool,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read at most [`MAX_PAYLOAD`] bytes.
    Read {
        /// In one content chunk.
        dont_fragment: bool,
    },
    /// Write the payload that follows in the stream: `length` bytes, at most [`MAX_PAYLOAD`].
    Write,
    /// Make durable what was answered.
    Flush,
    /// Discard.
    Trim,
    /// Prefetch.
    Cache,
    /// Zero a range.
    WriteZeroes {
        /// The range is to stay allocated.
        no_hole: bool,
        /// Fail with [`ErrorCode::NotSup`] rather than write zeroes out.
        fast: bool,
    },
    /// Describe extents.
    BlockStatus {
        /// One extent per context, within the range.
        one: bool,
        /// Places in [`Session::contexts`] of the contexts to describe, in order.
        contexts: Vec<usize>,
    },
}

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

/// A header as it was sent.
#[derive(Clone, Copy, Debug)]
struct RawRequest {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

/// Why a request is refused.
type Refusal = (ErrorCode, &'static str);

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
            return Some(raw.refused((ErrorCode::Invalid, "too many metadata contexts")));
        }
        match self.check(&raw) {
            Ok(request) => Some(Incoming::Request(request)),
            Err(refusal) => {
                if payload > 0 {
                    self.state = State::Skip(payload);
                }
                Some(raw.refused(refusal))
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
        match self.check_status_payload(raw, payload) {
            Ok(request) => Incoming::Request(request),
            Err(refusal) => raw.refused(refusal),
        }
    }

    fn check_status_payload(&self, raw: RawRequest, payload: &[u8]) -> Result<Request, Refusal> {
        let (length, ids) = payload
            .split_first_chunk::<8>()
            .ok_or((ErrorCode::Invalid, "payload is too short"))?;
        if ids.is_empty() || !ids.len().is_multiple_of(4) {
            return Err((
                ErrorCode::Invalid,
                "payload is not a list of metadata contexts",
            ));
        }
        let mut chosen = Vec::new();
        for id in ids
            .chunks_exact(4)
            .map(|id| u32::from_be_bytes([id[0], id[1], id[2], id[3]]))
        {
            match self
                .session
                .contexts
                .iter()
                .position(|context| context.id == id)
            {
                Some(place) if !chosen.contains(&place) => chosen.push(place),
                _ => {
                    return Err((
                        ErrorCode::Invalid,
                        "metadata context is unknown or named twice",
                    ));
                }
            }
        }
        let effect = RawRequest {
            flags: raw.flags & !CommandFlags::PAYLOAD_LEN.bits(),
            length: u64::from_be_bytes(*length),
            ..raw
        };
        let mut request = self.check(&effect)?;
        if let Command::BlockStatus { contexts, .. } = &mut request.command {
            *contexts = chosen;
        }
        Ok(request)
    }

    fn check(&self, raw: &RawRequest) -> Result<Request, Refusal> {
        let flags = CommandFlags::from_bits(raw.flags)
            .ok_or((ErrorCode::Invalid, "unknown command flags"))?;
        let command = self.command(raw, flags)?;
        if !self.valid_flags(&command).contains(flags) {
            return Err((ErrorCode::Invalid, "command flags do not fit the command"));
        }
        if command.writes() && self.session.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err((ErrorCode::Perm, "export is read-only"));
        }
        self.check_range(raw, &command)?;
        let fua = flags.contains(CommandFlags::FUA) && command.writes();
        Ok(Request {
            cookie: raw.cookie,
            command,
            offset: raw.offset,
            length: raw.length,
            fua,
        })
    }

    fn command(&self, raw: &RawRequest, flags: CommandFlags) -> Result<Command, Refusal> {
        Ok(match raw.kind {
            cmd::READ => Command::Read {
                dont_fragment: flags.contains(CommandFlags::DF),
            },
            cmd::WRITE => Command::Write,
            cmd::FLUSH => Command::Flush,
            cmd::TRIM => Command::Trim,
            cmd::CACHE => Command::Cache,
            cmd::WRITE_ZEROES => Command::WriteZeroes {
                no_hole: flags.contains(CommandFlags::NO_HOLE),
                fast: flags.contains(CommandFlags::FAST_ZERO),
            },
            cmd::BLOCK_STATUS if self.session.contexts.is_empty() => {
                return Err((ErrorCode::Invalid, "no metadata context was selected"));
            }
            cmd::BLOCK_STATUS => Command::BlockStatus {
                one: flags.contains(CommandFlags::REQ_ONE),
                contexts: (0..self.session.contexts.len()).collect(),
            },
            _ => return Err((ErrorCode::Invalid, "unknown command")),
        })
    }

    /// FUA is valid with every command; the rest depends on the command and on what was negotiated.
    fn valid_flags(&self, command: &Command) -> CommandFlags {
        let extra = match command {
            Command::Read { .. } if self.session.mode >= ReplyMode::Structured => CommandFlags::DF,
            Command::Write if self.session.mode == ReplyMode::Extended => CommandFlags::PAYLOAD_LEN,
            Command::WriteZeroes { .. } => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Command::BlockStatus { .. } => CommandFlags::REQ_ONE,
            _ => CommandFlags::empty(),
        };
        CommandFlags::FUA | extra
    }

    fn check_range(&self, raw: &RawRequest, command: &Command) -> Result<(), Refusal> {
        let inside =
            raw.offset <= self.session.size && raw.length <= self.session.size - raw.offset;
        match command {
            Command::Flush if raw.offset != 0 || raw.length != 0 => Err((
                ErrorCode::Invalid,
                "offset and length of a flush are not zero",
            )),
            Command::Write | Command::WriteZeroes { .. } if !inside => {
                Err((ErrorCode::NoSpace, "write past the end of the export"))
            }
            _ if !inside => Err((ErrorCode::Invalid, "request past the end of the export")),
            Command::Read { .. } if raw.length > u64::from(MAX_PAYLOAD) => Err((
                ErrorCode::Invalid,
                "read is longer than the maximum block size",
            )),
            Command::BlockStatus { .. } if raw.length == 0 => {
                Err((ErrorCode::Invalid, "block status of no bytes"))
            }
            _ => Ok(()),
        }
    }
}

impl Command {
    /// Whether a read-only export refuses it.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes { .. })
    }
}

impl RawRequest {
    /// A header of the length that belongs to `mode`; `None` if the magic is wrong.
    fn decode(header: &[u8], mode: ReplyMode) -> Option<Self> {
        let field = |at: usize, length: usize| {
            header[at..at + length]
                .iter()
                .fold(0, |value: u64, &byte| value << 8 | u64::from(byte))
        };
        let (magic, length) = match mode {
            ReplyMode::Extended => (EXTENDED_REQUEST_MAGIC, field(24, 8)),
            ReplyMode::Simple | ReplyMode::Structured => (REQUEST_MAGIC, field(24, 4)),
        };
        let (flags, kind) = (field(4, 2) as u16, field(6, 2) as u16);
        (field(0, 4) == u64::from(magic)).then_some(Self {
            flags,
            kind,
            cookie: field(8, 8),
            offset: field(16, 8),
            length,
        })
    }

    fn refused(&self, (error, text): Refusal) -> Incoming {
        Incoming::Refused {
            cookie: self.cookie,
            offset: self.offset,
            error,
            text,
        }
    }
}

/// Move bytes from `input` to `buffer` until that has `length`; tells how many.
fn fill(buffer: &mut Vec<u8>, length: usize, input: &[u8]) -> usize {
    let used = (length - buffer.len()).min(input.len());
    buffer.extend_from_slice(&input[..used]);
    used
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;

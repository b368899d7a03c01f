//! Requests of the transmission phase: decoded, and checked against the session.

use super::errno::ErrorCode;
use super::protocol::{
    CommandFlags, EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, ReplyMode, TransmissionFlags,
    cmd,
};
use super::session::Session;

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

/// A header as it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawRequest {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Why a request is refused.
pub(super) type Refusal = (ErrorCode, &'static str);

impl Command {
    /// Whether a read-only export refuses it.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes { .. })
    }

    /// FUA is valid with every command; the rest depends on the command and on what was negotiated.
    fn valid_flags(&self, mode: ReplyMode) -> CommandFlags {
        let extra = match self {
            Self::Read { .. } if mode >= ReplyMode::Structured => CommandFlags::DF,
            Self::Write if mode == ReplyMode::Extended => CommandFlags::PAYLOAD_LEN,
            Self::WriteZeroes { .. } => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Self::BlockStatus { .. } => CommandFlags::REQ_ONE,
            _ => CommandFlags::empty(),
        };
        CommandFlags::FUA | extra
    }
}

impl RawRequest {
    /// A header of the length that belongs to `mode`; `None` if the magic is wrong.
    pub(super) fn decode(header: &[u8], mode: ReplyMode) -> Option<Self> {
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

    /// Check BLOCK_STATUS whose payload gives the length and the contexts.
    pub(super) fn check_status(
        &self,
        session: &Session,
        payload: &[u8],
    ) -> Result<Request, Refusal> {
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
            match session.contexts.iter().position(|context| context.id == id) {
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
            flags: self.flags & !CommandFlags::PAYLOAD_LEN.bits(),
            length: u64::from_be_bytes(*length),
            ..*self
        };
        let mut request = effect.check(session)?;
        if let Command::BlockStatus { contexts, .. } = &mut request.command {
            *contexts = chosen;
        }
        Ok(request)
    }

    /// Check everything that the header tells.
    pub(super) fn check(&self, session: &Session) -> Result<Request, Refusal> {
        let flags = CommandFlags::from_bits(self.flags)
            .ok_or((ErrorCode::Invalid, "unknown command flags"))?;
        let command = self.command(session, flags)?;
        if !command.valid_flags(session.mode).contains(flags) {
            return Err((ErrorCode::Invalid, "command flags do not fit the command"));
        }
        if command.writes() && session.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err((ErrorCode::Perm, "export is read-only"));
        }
        self.check_range(session, &command)?;
        let fua = flags.contains(CommandFlags::FUA) && command.writes();
        Ok(Request {
            cookie: self.cookie,
            command,
            offset: self.offset,
            length: self.length,
            fua,
        })
    }

    fn command(&self, session: &Session, flags: CommandFlags) -> Result<Command, Refusal> {
        Ok(match self.kind {
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
            cmd::BLOCK_STATUS if session.contexts.is_empty() => {
                return Err((ErrorCode::Invalid, "no metadata context was selected"));
            }
            cmd::BLOCK_STATUS => Command::BlockStatus {
                one: flags.contains(CommandFlags::REQ_ONE),
                contexts: (0..session.contexts.len()).collect(),
            },
            _ => return Err((ErrorCode::Invalid, "unknown command")),
        })
    }

    fn check_range(&self, session: &Session, command: &Command) -> Result<(), Refusal> {
        let inside = self.offset <= session.size && self.length <= session.size - self.offset;
        match command {
            Command::Flush if self.offset != 0 || self.length != 0 => Err((
                ErrorCode::Invalid,
                "offset and length of a flush are not zero",
            )),
            Command::Write | Command::WriteZeroes { .. } if !inside => {
                Err((ErrorCode::NoSpace, "write past the end of the export"))
            }
            _ if !inside => Err((ErrorCode::Invalid, "request past the end of the export")),
            Command::Read { .. } | Command::Cache if self.length > u64::from(MAX_PAYLOAD) => Err((
                ErrorCode::Invalid,
                "read is longer than the maximum block size",
            )),
            Command::BlockStatus { .. } if self.length == 0 => {
                Err((ErrorCode::Invalid, "block status of no bytes"))
            }
            _ => Ok(()),
        }
    }
}

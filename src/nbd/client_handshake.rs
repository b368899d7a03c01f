//! Fixed newstyle handshake, the client's side.

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::fields::{Fields, WrongLength};
use super::meta_context::ALLOCATION_CONTEXT;
use super::protocol::{
    GREETING_MAGIC, HandshakeFlags, OPTION_MAGIC, OPTION_REPLY_MAGIC, ReplyMode, TransmissionFlags,
    info, opt, rep,
};

/// Bytes of the server's greeting.
const GREETING: usize = 18;
/// Bytes of the header of a reply to an option.
const REPLY_HEADER: usize = 20;
/// Data of a reply that is looked at, in bytes; who sends more is given up.
const MAX_REPLY_LENGTH: usize = 16 << 10;
/// Replies in a handshake; who sends more is given up.
const MAX_REPLIES: u32 = 100;
/// Largest minimum block size that the specification allows, in bytes.
const MAX_MINIMUM: u32 = 64 << 10;

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Bytes of the export; a multiple of the minimum block size, and an `i64`.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Shape of replies; never extended.
    pub mode: ReplyMode,
    /// The server's number of `base:allocation`, where it has that.
    pub allocation: Option<u32>,
    /// What the server says about lengths, where it does.
    pub blocks: Option<BlockLimits>,
}

/// Block sizes that a server has announced, in bytes: powers of two but for the maximum, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLimits {
    /// Offsets and lengths are multiples of this.
    pub minimum: u32,
    /// Requests of this many bytes cost least.
    pub preferred: u32,
    /// Most bytes of data in one request.
    pub maximum: u32,
}

/// What is to be done next. Output is sent first in any case.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// More input is needed.
    Receive,
    /// There may be something more in the input.
    Proceed,
    /// The transmission phase begins.
    Enter(Terms),
}

/// State of a handshake. Bytes go in by [`input`](Self::input) and out by
/// [`take_output`](Self::take_output); [`step`](Self::step) decides.
#[derive(Debug)]
pub struct ClientHandshake {
    export: String,
    /// The option that the server is to answer; none before its greeting.
    asked: Option<u32>,
    input: Vec<u8>,
    output: Vec<u8>,
    replies: u32,
    mode: ReplyMode,
    allocation: Option<u32>,
    described: Option<(u64, TransmissionFlags)>,
    blocks: Option<BlockLimits>,
}

impl ClientHandshake {
    /// A connection just made, on which this export is wanted.
    pub fn new(export: &str) -> Self {
        Self {
            export: export.to_owned(),
            asked: None,
            input: Vec::new(),
            output: Vec::new(),
            replies: 0,
            mode: ReplyMode::Simple,
            allocation: None,
            described: None,
            blocks: None,
        }
    }

    /// Bytes received from the server. Call [`step`](Self::step) until it wants more before the next call: this is
    /// what bounds the memory.
    pub fn input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes to be sent to the server.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Deals with the next element of the input.
    ///
    /// # Errors
    /// The server refuses, or what it says makes no sense.
    pub fn step(&mut self) -> Result<ClientStep> {
        match self.asked {
            None => self.greeting(),
            Some(option) => self.reply(option),
        }
    }

    fn greeting(&mut self) -> Result<ClientStep> {
        if self.input.len() < GREETING {
            return Ok(ClientStep::Receive);
        }
        let greeting: Vec<u8> = self.input.drain(..GREETING).collect();
        let mut fields = Fields(&greeting);
        if fields.u64()? != GREETING_MAGIC {
            return Err(violation("its greeting is not that of an NBD server"));
        }
        let magic = fields.u64()?;
        let flags = HandshakeFlags::from_bits_truncate(fields.u16()?);
        if magic != OPTION_MAGIC || !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            let message = "The NBD server does not speak the fixed newstyle protocol";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let answer = u32::from(flags.bits());
        self.output.extend(answer.to_be_bytes());
        self.ask(opt::STRUCTURED_REPLY, &[]);
        Ok(ClientStep::Proceed)
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        self.asked = Some(option);
        self.output.extend(OPTION_MAGIC.to_be_bytes());
        self.output.extend(option.to_be_bytes());
        self.output.extend((data.len() as u32).to_be_bytes());
        self.output.extend(data);
    }

    fn ask_context(&mut self) {
        let mut data = self.export_field();
        data.extend(1u32.to_be_bytes());
        data.extend((ALLOCATION_CONTEXT.len() as u32).to_be_bytes());
        data.extend(ALLOCATION_CONTEXT.as_bytes());
        self.ask(opt::SET_META_CONTEXT, &data);
    }

    fn ask_to_go(&mut self) {
        let mut data = self.export_field();
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.ask(opt::GO, &data);
    }

    fn export_field(&self) -> Vec<u8> {
        let mut field = Vec::from((self.export.len() as u32).to_be_bytes());
        field.extend(self.export.as_bytes());
        field
    }

    fn reply(&mut self, option: u32) -> Result<ClientStep> {
        let Some((kind, length)) = self.reply_header(option)? else {
            return Ok(ClientStep::Receive);
        };
        if self.input.len() < REPLY_HEADER + length {
            return Ok(ClientStep::Receive);
        }
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(violation("it sends too many replies to options"));
        }
        let data: Vec<u8> = self.input.drain(..REPLY_HEADER + length).collect();
        let data = &data[REPLY_HEADER..];
        match option {
            opt::STRUCTURED_REPLY => self.structured(kind, data),
            opt::SET_META_CONTEXT => self.context(kind, data),
            _ => self.go(kind, data),
        }
    }

    /// Type and length of the reply at the front of the input, once it is there.
    fn reply_header(&self, option: u32) -> Result<Option<(u32, usize)>> {
        if self.input.len() < REPLY_HEADER {
            return Ok(None);
        }
        let mut fields = Fields(&self.input);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(violation("wrong magic of a reply to an option"));
        }
        if fields.u32()? != option {
            return Err(violation("it answers an option that was not sent"));
        }
        let (kind, length) = (fields.u32()?, fields.u32()? as usize);
        if length > MAX_REPLY_LENGTH {
            return Err(violation("a reply to an option is too long"));
        }
        Ok(Some((kind, length)))
    }

    fn structured(&mut self, kind: u32, data: &[u8]) -> Result<ClientStep> {
        match kind {
            rep::ACK if data.is_empty() => {
                self.mode = ReplyMode::Structured;
                self.ask_context();
            }
            rep::ERR_UNSUP | rep::ERR_POLICY => self.ask_to_go(),
            _ => return Err(refused("NBD_OPT_STRUCTURED_REPLY", kind, data)),
        }
        Ok(ClientStep::Proceed)
    }

    fn context(&mut self, kind: u32, data: &[u8]) -> Result<ClientStep> {
        match kind {
            rep::META_CONTEXT => {
                let mut fields = Fields(data);
                let id = fields.u32()?;
                if fields.0 != ALLOCATION_CONTEXT.as_bytes() || self.allocation.is_some() {
                    return Err(violation(
                        "it selects a metadata context that was not asked for",
                    ));
                }
                self.allocation = Some(id);
            }
            rep::ACK if data.is_empty() => self.ask_to_go(),
            // The export that is not there is told in answer to NBD_OPT_GO.
            kind if is_error(kind) => {
                self.allocation = None;
                self.ask_to_go();
            }
            _ => return Err(refused("NBD_OPT_SET_META_CONTEXT", kind, data)),
        }
        Ok(ClientStep::Proceed)
    }

    fn go(&mut self, kind: u32, data: &[u8]) -> Result<ClientStep> {
        match kind {
            rep::INFO => self.information(data)?,
            rep::ACK if data.is_empty() => return self.enter(),
            rep::ERR_UNKNOWN => {
                let message = "Requested export not available";
                return Err(Error::new(ErrorKind::NotFound, message));
            }
            _ => return Err(refused("NBD_OPT_GO", kind, data)),
        }
        Ok(ClientStep::Proceed)
    }

    fn information(&mut self, data: &[u8]) -> Result<()> {
        let mut fields = Fields(data);
        match fields.u16()? {
            info::EXPORT => {
                let size = fields.u64()?;
                let flags = TransmissionFlags::from_bits_truncate(fields.u16()?);
                fields.end()?;
                if size > i64::MAX as u64 {
                    return Err(violation("its export is too large"));
                }
                self.described = Some((size, flags));
            }
            info::BLOCK_SIZE => {
                let blocks = BlockLimits {
                    minimum: fields.u32()?,
                    preferred: fields.u32()?,
                    maximum: fields.u32()?,
                };
                fields.end()?;
                blocks.check()?;
                self.blocks = Some(blocks);
            }
            _ => {}
        }
        Ok(())
    }

    fn enter(&mut self) -> Result<ClientStep> {
        if !self.input.is_empty() {
            return Err(violation("it answers before it was asked for anything"));
        }
        let Some((size, flags)) = self.described else {
            return Err(violation("it does not say what the export is"));
        };
        let minimum = self.blocks.map_or(1, |blocks| blocks.minimum);
        if !size.is_multiple_of(u64::from(minimum)) {
            let message = format!(
                "The export's size of {size} bytes is no multiple of its minimum block size of \
                 {minimum}"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(ClientStep::Enter(Terms {
            size,
            flags,
            mode: self.mode,
            allocation: self.allocation,
            blocks: self.blocks,
        }))
    }
}

impl BlockLimits {
    fn check(&self) -> Result<()> {
        let fits = self.minimum.is_power_of_two()
            && self.minimum <= MAX_MINIMUM
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.maximum >= self.minimum;
        match fits {
            true => Ok(()),
            false => Err(violation("its block sizes make no sense")),
        }
    }
}

fn is_error(kind: u32) -> bool {
    kind & (1 << 31) != 0
}

/// What the server said in place of an answer.
fn refused(option: &str, kind: u32, data: &[u8]) -> Error {
    if !is_error(kind) {
        return violation(format!("unexpected reply {kind:#x} to {option}"));
    }
    if kind == rep::ERR_TLS_REQD {
        let message = "The NBD server wants TLS, which is not spoken";
        return Error::new(ErrorKind::Unsupported, message);
    }
    let text: String = String::from_utf8_lossy(data).chars().take(200).collect();
    let message = format!("The NBD server refused {option} ({kind:#x}): {text:?}");
    Error::new(ErrorKind::Unsupported, message)
}

/// The server broke the protocol.
pub(super) fn violation(what: impl std::fmt::Display) -> Error {
    let message = format!("The NBD server broke the protocol: {what}");
    Error::from_errno(Errno::EIO, message)
}

impl From<WrongLength> for Error {
    fn from(wrong: WrongLength) -> Error {
        match wrong {
            WrongLength::Short => violation("a reply is too short"),
            WrongLength::Long(_) => violation("a reply is too long"),
        }
    }
}

#[cfg(test)]
#[path = "client_handshake_tests.rs"]
mod tests;

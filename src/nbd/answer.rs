//! Replies of the transmission phase as a client takes them, checked against what it asked for.

use std::collections::BTreeMap;

use crate::error::{Error, Result, strerror};
use crate::range::ByteRange;

use super::client_handshake::violation;
use super::errno::ErrorCode;
use super::extent::Extent;
use super::fields::Fields;
use super::option::MAX_STRING_LENGTH;
use super::protocol::{
    CommandFlags, REQUEST_MAGIC, ReplyMode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, cmd,
};

/// Bytes of the magic that every reply begins with.
pub const MAGIC_LENGTH: usize = 4;
/// Bytes of the rest of the longest header.
pub const MAX_HEADER_REST: usize = 16;

/// Stretches of a read that have arrived and do not touch each other: who sends more is given up.
const MAX_PIECES: usize = 1 << 16;
/// Bytes of the longest payload that is no data.
const MAX_SMALL: u32 = 64 << 10;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Data.
    Read,
    /// The data follows; durable when answered, or not.
    Write {
        /// Durable.
        fua: bool,
    },
    /// Everything answered before is to be durable.
    Flush,
    /// The content is not needed.
    Trim,
    /// Zeroes.
    WriteZeroes {
        /// They are to take space.
        no_hole: bool,
    },
    /// The first extent.
    BlockStatus,
    /// No more; not answered.
    Disconnect,
}

impl Question {
    /// The header of the request.
    pub fn encode(self, cookie: u64, range: ByteRange) -> [u8; 28] {
        let (kind, flags) = match self {
            Question::Read => (cmd::READ, CommandFlags::empty()),
            Question::Write { fua: false } => (cmd::WRITE, CommandFlags::empty()),
            Question::Write { fua: true } => (cmd::WRITE, CommandFlags::FUA),
            Question::Flush => (cmd::FLUSH, CommandFlags::empty()),
            Question::Trim => (cmd::TRIM, CommandFlags::empty()),
            Question::WriteZeroes { no_hole: false } => (cmd::WRITE_ZEROES, CommandFlags::empty()),
            Question::WriteZeroes { no_hole: true } => (cmd::WRITE_ZEROES, CommandFlags::NO_HOLE),
            Question::BlockStatus => (cmd::BLOCK_STATUS, CommandFlags::REQ_ONE),
            Question::Disconnect => (cmd::DISC, CommandFlags::empty()),
        };
        let mut header = [0; 28];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&flags.bits().to_be_bytes());
        header[6..8].copy_from_slice(&kind.to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&range.start().to_be_bytes());
        header[24..].copy_from_slice(&(range.length() as u32).to_be_bytes());
        header
    }

    /// It changes what the export holds, and is not durable by itself.
    pub fn needs_flush(self) -> bool {
        use Question::{Trim, Write, WriteZeroes};
        matches!(self, Write { fua: false } | Trim | WriteZeroes { .. })
    }
}

/// The header of a reply or of one of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// Which request it belongs to.
    pub cookie: u64,
    /// Whether it is the last.
    pub last: bool,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Simple { error: u32 },
    Chunk { kind: u16, length: u32 },
}

impl ReplyHeader {
    /// Bytes that follow this magic in the header.
    ///
    /// # Errors
    /// No reply begins like that.
    pub fn rest_length(mode: ReplyMode, magic: [u8; MAGIC_LENGTH]) -> Result<usize> {
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => Ok(12),
            STRUCTURED_REPLY_MAGIC if mode == ReplyMode::Structured => Ok(16),
            magic => Err(violation(format!("wrong magic {magic:#x} of a reply"))),
        }
    }

    /// Decodes what follows the magic.
    ///
    /// # Errors
    /// It is malformed.
    pub fn decode(rest: &[u8]) -> Result<ReplyHeader> {
        let mut fields = Fields(rest);
        if rest.len() == 12 {
            let error = fields.u32()?;
            return Ok(ReplyHeader {
                cookie: fields.u64()?,
                last: true,
                shape: Shape::Simple { error },
            });
        }
        let (flags, kind) = (fields.u16()?, fields.u16()?);
        let (cookie, length) = (fields.u64()?, fields.u32()?);
        Ok(ReplyHeader {
            cookie,
            last: flags & chunk::FLAG_DONE != 0,
            shape: Shape::Chunk { kind, length },
        })
    }
}

/// What follows a header in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    Nothing,
    /// All data of the read.
    Whole,
    /// An offset of 8 bytes for [`Answer::data`], and this many bytes of data.
    Data(usize),
    /// This many bytes for [`Answer::payload`].
    Small(usize),
}

/// What was told of a request at its end.
#[derive(Debug)]
pub enum Told {
    /// It was carried out.
    Done,
    /// The first extent; at least a byte long.
    Extent(Extent),
    /// It failed.
    Failed(Error),
}

/// The reply to one request in the making.
#[derive(Debug)]
pub struct Answer {
    question: Question,
    range: ByteRange,
    mode: ReplyMode,
    allocation: Option<u32>,
    kind: u16,
    /// Start and end of stretches of data that have arrived.
    pieces: BTreeMap<u64, u64>,
    extent: Option<Extent>,
    error: Option<Error>,
}

impl Answer {
    /// None yet. `allocation`: the context that a block status is told in.
    pub fn new(question: Question, range: ByteRange, mode: ReplyMode, allocation: u32) -> Answer {
        Answer {
            question,
            range,
            mode,
            allocation: (question == Question::BlockStatus).then_some(allocation),
            kind: chunk::NONE,
            pieces: BTreeMap::new(),
            extent: None,
            error: None,
        }
    }

    /// What follows this header.
    ///
    /// # Errors
    /// It is no answer to the request.
    pub fn begin(&mut self, header: &ReplyHeader) -> Result<Body> {
        let reads = self.question == Question::Read;
        match header.shape {
            Shape::Simple { .. }
                if self.mode == ReplyMode::Structured && (reads || self.allocation.is_some()) =>
            {
                Err(violation("a simple reply in place of a structured one"))
            }
            Shape::Simple { error: 0 } if reads => {
                self.arrived(self.range)?;
                Ok(Body::Whole)
            }
            Shape::Simple { error: 0 } => Ok(Body::Nothing),
            Shape::Simple { error } => {
                self.fail(error, "");
                Ok(Body::Nothing)
            }
            Shape::Chunk { kind, length } => {
                self.kind = kind;
                self.chunk(kind, length, header.last)
            }
        }
    }

    fn chunk(&self, kind: u16, length: u32, last: bool) -> Result<Body> {
        let reads = self.question == Question::Read;
        let longest = match kind {
            chunk::NONE if length == 0 && last => return Ok(Body::Nothing),
            chunk::OFFSET_DATA if reads && length > 8 => {
                let length = u64::from(length) - 8;
                if length > self.range.length() {
                    return Err(violation("more data than was asked for"));
                }
                return Ok(Body::Data(length as usize));
            }
            chunk::OFFSET_HOLE if reads && length == 12 => 12,
            chunk::BLOCK_STATUS if self.allocation.is_some() && length >= 12 => MAX_SMALL,
            kind if is_error(kind) && length >= 6 => 6 + MAX_STRING_LENGTH as u32 + 8,
            _ => return Err(violation(format!("chunk {kind:#x} of {length} bytes"))),
        };
        match length <= longest {
            true => Ok(Body::Small(length as usize)),
            false => Err(violation(format!("a chunk of {length} bytes is too long"))),
        }
    }

    /// Where in the request's memory data of this offset belongs.
    ///
    /// # Errors
    /// It was not asked for, or has arrived already.
    pub fn data(&mut self, offset: [u8; 8], length: usize) -> Result<usize> {
        let range = ByteRange::new(u64::from_be_bytes(offset), length as u64);
        self.place(range)
    }

    /// The payload of a chunk that is no data: where zeroes belong in the request's memory, and how many.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<Option<(usize, usize)>> {
        let mut fields = Fields(bytes);
        match self.kind {
            chunk::OFFSET_HOLE => {
                let (offset, length) = (fields.u64()?, fields.u32()?);
                let range = ByteRange::new(offset, u64::from(length));
                let at = self.place(range)?;
                return Ok(Some((at, length as usize)));
            }
            chunk::BLOCK_STATUS => self.status(fields)?,
            _ => {
                let (error, length) = (fields.u32()?, usize::from(fields.u16()?));
                let text = fields
                    .bytes(length)
                    .map_err(|_| violation("the text of an error is cut off"))?;
                if error == 0 {
                    return Err(violation("an error without a number"));
                }
                self.fail(error, &String::from_utf8_lossy(text));
            }
        }
        Ok(None)
    }

    fn status(&mut self, mut fields: Fields<'_>) -> Result<()> {
        if !fields.0.len().is_multiple_of(4) || self.extent.is_some() {
            return Err(violation("a block status of the wrong length"));
        }
        if Some(fields.u32()?) != self.allocation {
            return Err(violation("block status of another context"));
        }
        let length = u64::from(fields.u32()?).min(self.range.length());
        if length == 0 {
            return Err(violation("an extent of no bytes"));
        }
        let flags = fields.u32()?;
        self.extent = Some(Extent { length, flags });
        Ok(())
    }

    fn place(&mut self, range: Option<ByteRange>) -> Result<usize> {
        let inside = range.filter(|range| !range.is_empty() && self.range.contains(range));
        let range = inside.ok_or_else(|| violation("data that was not asked for"))?;
        self.arrived(range)?;
        Ok((range.start() - self.range.start()) as usize)
    }

    fn arrived(&mut self, range: ByteRange) -> Result<()> {
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((&before, &until)) = self.pieces.range(..end).next_back() {
            if until > start {
                return Err(violation("the same data twice"));
            }
            if until == start {
                start = before;
            }
        }
        if let Some(until) = self.pieces.remove(&end) {
            end = until;
        }
        self.pieces.insert(start, end);
        match self.pieces.len() > MAX_PIECES {
            true => Err(violation("data in too many pieces")),
            false => Ok(()),
        }
    }

    fn fail(&mut self, error: u32, text: &str) {
        let text: String = text.chars().take(200).collect();
        let errno = ErrorCode::errno_of(error);
        let message = match text.is_empty() {
            true => format!("The NBD server failed a request: {}", strerror(errno)),
            false => format!(
                "The NBD server failed a request: {} ({text:?})",
                strerror(errno)
            ),
        };
        self.error
            .get_or_insert_with(|| Error::from_errno(errno, message));
    }

    /// The last chunk was taken.
    ///
    /// # Errors
    /// Something is missing.
    pub fn finish(&mut self) -> Result<Told> {
        if let Some(error) = self.error.take() {
            return Ok(Told::Failed(error));
        }
        let whole = self.pieces.get(&self.range.start()) == Some(&self.range.end());
        match (self.question, self.extent) {
            (Question::Read, _) if !whole => Err(violation("data is missing")),
            (Question::BlockStatus, None) => Err(violation("the block status is missing")),
            (_, Some(extent)) => Ok(Told::Extent(extent)),
            _ => Ok(Told::Done),
        }
    }
}

fn is_error(kind: u16) -> bool {
    kind & (1 << 15) != 0
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;

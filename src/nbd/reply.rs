//! Replies of the transmission phase.

use super::errno::ErrorCode;
use super::extent::Extent;
use super::option::MAX_STRING_LENGTH;
use super::protocol::{
    EXTENDED_REPLY_MAGIC, ReplyMode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use super::request::Request;

/// Writes replies in the shape that was negotiated. Each function gives the bytes up to the data of a read, which the
/// caller sends after them.
#[derive(Clone, Copy, Debug)]
pub struct ReplyWriter {
    mode: ReplyMode,
}

/// What marks a reply as the answer to its request.
#[derive(Clone, Copy, Debug)]
pub struct ReplyTo {
    /// The client's mark.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
}

impl From<&Request> for ReplyTo {
    fn from(request: &Request) -> Self {
        Self {
            cookie: request.cookie,
            offset: request.offset,
        }
    }
}

impl ReplyWriter {
    /// For a connection in `mode`.
    pub fn new(mode: ReplyMode) -> Self {
        Self { mode }
    }

    /// Whether a read may be answered in pieces.
    pub fn has_chunks(&self) -> bool {
        self.mode >= ReplyMode::Structured
    }

    /// Success without data; also ends a reply in chunks.
    pub fn done(&self, to: ReplyTo) -> Vec<u8> {
        match self.mode {
            ReplyMode::Simple => simple(0, to),
            _ => self.chunk(chunk::FLAG_DONE, chunk::NONE, to, 0),
        }
    }

    /// Failure, with a text where the mode has room for one. Ends the reply.
    pub fn error(&self, to: ReplyTo, error: ErrorCode, text: &str) -> Vec<u8> {
        if self.mode == ReplyMode::Simple {
            return simple(error.value(), to);
        }
        let text = clip(text, MAX_STRING_LENGTH);
        let mut reply = self.chunk(chunk::FLAG_DONE, chunk::ERROR, to, 6 + text.len() as u64);
        reply.extend(error.value().to_be_bytes());
        reply.extend((text.len() as u16).to_be_bytes());
        reply.extend(text.as_bytes());
        reply
    }

    /// What goes before `length` bytes of data read at `offset`. Without chunks the data is the whole reply; with
    /// chunks `last` says whether it ends the reply.
    pub fn data(&self, to: ReplyTo, offset: u64, length: u32, last: bool) -> Vec<u8> {
        if self.mode == ReplyMode::Simple {
            return simple(0, to);
        }
        let mut reply = self.chunk(flags(last), chunk::OFFSET_DATA, to, 8 + u64::from(length));
        reply.extend(offset.to_be_bytes());
        reply
    }

    /// `length` bytes at `offset` read as zeroes; only with chunks.
    pub fn hole(&self, to: ReplyTo, offset: u64, length: u32, last: bool) -> Vec<u8> {
        let mut reply = self.chunk(flags(last), chunk::OFFSET_HOLE, to, 12);
        reply.extend(offset.to_be_bytes());
        reply.extend(length.to_be_bytes());
        reply
    }

    /// Extents of the context `id`; only with chunks. Compact replies cannot express extents of 4 GiB and more: the
    /// answer then stops early, on a multiple of 64 KiB, and the client asks again.
    pub fn block_status(&self, to: ReplyTo, id: u32, extents: &[Extent], last: bool) -> Vec<u8> {
        match self.mode {
            ReplyMode::Extended => self.extended_status(to, id, extents, last),
            _ => self.compact_status(to, id, extents, last),
        }
    }

    fn extended_status(&self, to: ReplyTo, id: u32, extents: &[Extent], last: bool) -> Vec<u8> {
        let length = 8 + 16 * extents.len() as u64;
        let mut reply = self.chunk(flags(last), chunk::BLOCK_STATUS_EXT, to, length);
        reply.extend(id.to_be_bytes());
        reply.extend((extents.len() as u32).to_be_bytes());
        for extent in extents {
            reply.extend(extent.length.to_be_bytes());
            reply.extend(u64::from(extent.flags).to_be_bytes());
        }
        reply
    }

    fn compact_status(&self, to: ReplyTo, id: u32, extents: &[Extent], last: bool) -> Vec<u8> {
        const LONGEST: u32 = !0xffff;
        let mut descriptors = Vec::with_capacity(8 * extents.len());
        for extent in extents {
            let length = u32::try_from(extent.length).unwrap_or(LONGEST);
            descriptors.extend(length.to_be_bytes());
            descriptors.extend(extent.flags.to_be_bytes());
            if u64::from(length) < extent.length {
                break;
            }
        }
        let mut reply = self.chunk(
            flags(last),
            chunk::BLOCK_STATUS,
            to,
            4 + descriptors.len() as u64,
        );
        reply.extend(id.to_be_bytes());
        reply.extend(descriptors);
        reply
    }

    /// Header of a chunk with `length` bytes of payload. Payloads stay far below 4 GiB: data is bounded by
    /// `MAX_PAYLOAD`, extents by `MAX_EXTENTS`.
    fn chunk(&self, flags: u16, kind: u16, to: ReplyTo, length: u64) -> Vec<u8> {
        assert!(self.mode != ReplyMode::Simple, "chunks were not negotiated");
        let mut reply = Vec::with_capacity(64);
        let extended = self.mode == ReplyMode::Extended;
        let magic = if extended {
            EXTENDED_REPLY_MAGIC
        } else {
            STRUCTURED_REPLY_MAGIC
        };
        reply.extend(magic.to_be_bytes());
        reply.extend(flags.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend(to.cookie.to_be_bytes());
        if extended {
            reply.extend(to.offset.to_be_bytes());
            reply.extend(length.to_be_bytes());
        } else {
            reply.extend((length as u32).to_be_bytes());
        }
        reply
    }
}

fn simple(error: u32, to: ReplyTo) -> Vec<u8> {
    let mut reply = Vec::with_capacity(16);
    reply.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply.extend(error.to_be_bytes());
    reply.extend(to.cookie.to_be_bytes());
    reply
}

fn flags(last: bool) -> u16 {
    if last { chunk::FLAG_DONE } else { 0 }
}

/// The longest prefix of `text` that has at most `length` bytes.
fn clip(text: &str, length: usize) -> &str {
    let end = (0..=length.min(text.len()))
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: ReplyTo = ReplyTo {
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
    };

    #[test]
    fn simple_replies_have_sixteen_bytes() {
        let writer = ReplyWriter::new(ReplyMode::Simple);
        let expected = b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08";
        assert_eq!(writer.done(TO), expected);
        assert_eq!(writer.data(TO, 0x1000, 512, true), expected);
        assert_eq!(
            writer.error(TO, ErrorCode::NoSpace, "full")[4..8],
            [0, 0, 0, 28]
        );
    }

    #[test]
    fn structured_chunks_carry_their_length() {
        let writer = ReplyWriter::new(ReplyMode::Structured);
        let data = writer.data(TO, 0x1000, 512, false);
        assert_eq!(data[..8], *b"\x66\x8e\x33\xef\0\0\0\x01");
        assert_eq!(data[16..20], 520u32.to_be_bytes());
        assert_eq!(data.len(), 28);
        let hole = writer.hole(TO, 0x1000, 512, true);
        assert_eq!(hole[4..8], *b"\0\x01\0\x02");
        assert_eq!(hole.len(), 32);
        let error = writer.error(TO, ErrorCode::Io, "bad");
        assert_eq!(error[16..], *b"\0\0\0\x09\0\0\0\x05\0\x03bad");
    }

    #[test]
    fn extended_chunks_repeat_the_offset() {
        let done = ReplyWriter::new(ReplyMode::Extended).done(TO);
        assert_eq!(done.len(), 32);
        assert_eq!(done[..4], EXTENDED_REPLY_MAGIC.to_be_bytes());
        assert_eq!(done[16..24], 0x1000u64.to_be_bytes());
    }

    #[test]
    fn compact_extents_stop_where_they_cannot_say_more() {
        let extents =
            [(512, 0), (8 << 30, 3), (512, 0)].map(|(length, flags)| Extent { length, flags });
        let compact = ReplyWriter::new(ReplyMode::Structured).block_status(TO, 7, &extents, true);
        assert_eq!(compact[16..24], *b"\0\0\0\x14\0\0\0\x07");
        assert_eq!(compact[24..], *b"\0\0\x02\0\0\0\0\0\xff\xff\0\0\0\0\0\x03");
        let extended = ReplyWriter::new(ReplyMode::Extended).block_status(TO, 7, &extents, true);
        assert_eq!(extended.len(), 32 + 8 + 3 * 16);
    }

    #[test]
    fn long_texts_are_clipped_between_characters() {
        assert_eq!(clip("aä", 2), "a");
        let writer = ReplyWriter::new(ReplyMode::Structured);
        assert_eq!(
            writer.error(TO, ErrorCode::Io, &"x".repeat(9000)).len(),
            20 + 6 + MAX_STRING_LENGTH
        );
    }
}

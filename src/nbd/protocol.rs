//! The numbers of the protocol, named as in the specification.

use bitflags::bitflags;

/// TCP port assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Largest payload of one request or content chunk, in bytes: what is advertised as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// First magic of the server's greeting, `NBDMAGIC`.
pub(super) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and magic of every option, `IHAVEOPT`.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of every reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a compact request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a request with extended headers.
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of a reply chunk with extended headers.
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Options a client may send (`NBD_OPT_*`).
pub(super) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options (`NBD_REP_*`).
pub(super) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub(crate) const ERR_POLICY: u32 = 1 << 31 | 2;
    pub(crate) const ERR_INVALID: u32 = 1 << 31 | 3;
    pub(crate) const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub(crate) const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub(crate) const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

/// Kinds of information about an export (`NBD_INFO_*`).
pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Request types (`NBD_CMD_*`).
pub(super) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Types of structured and extended reply chunks (`NBD_REPLY_TYPE_*`).
pub(super) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = 1 << 15 | 1;
    /// The flag `NBD_REPLY_FLAG_DONE` of a chunk.
    pub(crate) const FLAG_DONE: u16 = 1;
}

bitflags! {
    /// Handshake flags of the server, and the client's answer to them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct HandshakeFlags: u16 {
        const FIXED_NEWSTYLE = 1 << 0;
        const NO_ZEROES = 1 << 1;
    }

    /// What an export can do, as told to the client (`NBD_FLAG_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// FLUSH is understood.
        const SEND_FLUSH = 1 << 2;
        /// The FUA command flag is understood.
        const SEND_FUA = 1 << 3;
        /// TRIM is understood.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES is understood.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The DF command flag is understood; only with structured replies.
        const SEND_DF = 1 << 7;
        /// Flush and FUA hold for all connections to the export.
        const CAN_MULTI_CONN = 1 << 8;
        /// CACHE is understood.
        const SEND_CACHE = 1 << 10;
        /// The FAST_ZERO command flag is understood.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS may carry a payload; only with extended headers.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Flags of a request (`NBD_CMD_FLAG_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct CommandFlags: u16 {
        const FUA = 1 << 0;
        const NO_HOLE = 1 << 1;
        const DF = 1 << 2;
        const REQ_ONE = 1 << 3;
        const FAST_ZERO = 1 << 4;
        const PAYLOAD_LEN = 1 << 5;
    }
}

/// Shape of headers and replies in the transmission phase, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReplyMode {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// 64-bit requests and replies.
    Extended,
}

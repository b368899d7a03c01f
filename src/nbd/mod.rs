//! The NBD protocol: wire format and the state machines of both sides.
//!
//! This is the NBD specification (`doc/proto.md` of the reference implementation) turned into types: bytes go in,
//! decisions and bytes come out. It is neither a server nor a client: no socket, no clock, no buffer of guest data
//! and no block node is touched here. [`crate::export::nbd`] moves the bytes of a server and carries out its requests,
//! [`crate::protocol::nbd`] those of a client.
//!
//! * [`Handshake`]: fixed newstyle option haggling, until a [`Session`] is agreed on.
//! * [`RequestReader`]: request headers of the transmission phase, checked against the session.
//! * [`ReplyWriter`]: simple, structured and extended replies.
//!
//! The client's side, over the same numbers:
//!
//! * [`ClientHandshake`]: until [`Terms`] are agreed on.
//! * [`Question`]: the header of a request.
//! * [`ReplyHeader`], [`Answer`]: replies, checked against what was asked.
//!
//! Invariants:
//!
//! 1. No input panics and none makes this module hold more than [`MAX_OPTION_LENGTH`] bytes of it.
//! 2. Whatever a client may legally be told is told; the connection is closed only where the specification says so or
//!    where the stream's framing is lost.
//! 3. A [`Request`] that leaves the reader lies within the export and obeys its permissions and flags.

mod answer;
mod client_handshake;
mod errno;
mod extent;
mod family;
mod fields;
mod handshake;
mod meta_context;
mod negotiation;
mod option;
mod protocol;
mod reply;
mod request;
mod request_reader;
mod session;
mod uri;

pub use answer::{Answer, Body, MAGIC_LENGTH, MAX_HEADER_REST, Question, ReplyHeader, Told};
pub use client_handshake::{BlockLimits, ClientHandshake, ClientStep, Terms};
pub use errno::ErrorCode;
pub use extent::{Extent, ExtentList, MAX_EXTENTS, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
pub use family::is_family_allowed;
pub use handshake::{CloseReason, Handshake, Step};
pub use meta_context::{ALLOCATION_CONTEXT, SelectedContext};
pub use option::{MAX_OPTION_LENGTH, MAX_STRING_LENGTH};
pub use protocol::{DEFAULT_PORT, MAX_PAYLOAD, ReplyMode, TransmissionFlags};
pub use reply::{ReplyTo, ReplyWriter};
pub use request::{Command, Request};
pub use request_reader::{Incoming, RequestReader};
pub use session::{BlockSizes, Catalog, ExportInfo, Session};
pub use uri::percent_encoded;

#[cfg(test)]
mod recorded_tests;

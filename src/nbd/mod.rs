//! The NBD protocol: wire format and the server's state machines.
//!
//! This is the NBD specification (`doc/proto.md` of the reference implementation) turned into types: bytes go in,
//! decisions and bytes come out. It is not a server: no socket, no clock, no buffer of guest data and no block node is
//! touched here. [`crate::export::nbd`] moves the bytes and carries out the requests.
//!
//! * [`Handshake`]: fixed newstyle option haggling, until a [`Session`] is agreed on.
//! * [`RequestReader`]: request headers of the transmission phase, checked against the session.
//! * [`ReplyWriter`]: simple, structured and extended replies.
//!
//! A client side would stand beside these as `client_handshake` and `reply_reader`, over the same numbers.
//!
//! Invariants:
//!
//! 1. No input panics and none makes this module hold more than [`MAX_OPTION_LENGTH`] bytes of it.
//! 2. Whatever a client may legally be told is told; the connection is closed only where the specification says so or
//!    where the stream's framing is lost.
//! 3. A [`Request`] that leaves the reader lies within the export and obeys its permissions and flags.

mod errno;
mod extent;
mod handshake;
mod meta_context;
mod negotiation;
mod option;
mod protocol;
mod reply;
mod request;
mod request_reader;
mod session;

pub use errno::ErrorCode;
pub use extent::{Extent, ExtentList, MAX_EXTENTS, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
pub use handshake::{CloseReason, Handshake, Step};
pub use meta_context::{ALLOCATION_CONTEXT, SelectedContext};
pub use option::{MAX_OPTION_LENGTH, MAX_STRING_LENGTH};
pub use protocol::{DEFAULT_PORT, MAX_PAYLOAD, ReplyMode, TransmissionFlags};
pub use reply::{ReplyTo, ReplyWriter};
pub use request::{Command, Request};
pub use request_reader::{Incoming, RequestReader};
pub use session::{BlockSizes, Catalog, ExportInfo, Session};

#[cfg(test)]
mod recorded_tests;

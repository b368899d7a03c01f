//! Fixed newstyle handshake, the server's side.

use super::negotiation::Negotiation;
use super::option::{MAX_OPTION_LENGTH, MAX_STRING_LENGTH, Refusal, parse_string};
use super::protocol::{
    GREETING_MAGIC, HandshakeFlags, MAX_PAYLOAD, OPTION_MAGIC, ReplyMode, opt, rep,
};
use super::session::{Catalog, Session};

/// Bytes of an option's header: magic, option, length.
const OPTION_HEADER: usize = 16;

/// What is to be done next. Output is sent first in any case.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More input is needed.
    Receive,
    /// An option was answered, and there may be another one in the input.
    Answered,
    /// The transmission phase begins; what follows in the input belongs to it.
    Enter(Session),
    /// The connection is to be closed.
    Close(CloseReason),
}

/// Why a connection is closed during the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client asked for it.
    Aborted,
    /// The client named an export that is not there, in an option that allows no error reply.
    UnknownExport,
    /// The client broke the protocol in a way that allows no answer.
    Violation(&'static str),
}

/// State of one connection's handshake. Bytes go in by [`input`](Self::input) and out by
/// [`take_output`](Self::take_output); [`step`](Self::step) decides.
#[derive(Debug)]
pub struct Handshake {
    phase: Phase,
    input: Vec<u8>,
    negotiation: Negotiation,
    no_zeroes: bool,
    fixed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    ClientFlags,
    OptionHeader,
    OptionData {
        option: u32,
        length: usize,
    },
    /// The data of an option that is too long to look at.
    Skip {
        option: u32,
        remaining: usize,
    },
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A connection just accepted. The greeting is in the output.
    pub fn new() -> Self {
        let mut negotiation = Negotiation::new();
        let output = &mut negotiation.output;
        output.extend(GREETING_MAGIC.to_be_bytes());
        output.extend(OPTION_MAGIC.to_be_bytes());
        output.extend(HandshakeFlags::all().bits().to_be_bytes());
        Self {
            phase: Phase::ClientFlags,
            input: Vec::new(),
            negotiation,
            no_zeroes: false,
            fixed: false,
        }
    }

    /// Bytes received from the client. Call [`step`](Self::step) until it wants more before the next call: this is what
    /// bounds the memory.
    pub fn input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes to be sent to the client.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.negotiation.output)
    }

    /// Bytes received that belong to the transmission phase.
    pub fn into_rest(self) -> Vec<u8> {
        self.input
    }

    /// Deal with the next element of the input.
    pub fn step(&mut self, catalog: &dyn Catalog) -> Step {
        match self.phase {
            Phase::ClientFlags => self.client_flags(),
            Phase::OptionHeader => self.option_header(),
            Phase::OptionData { option, length } => match self.consume(length) {
                Some(data) => {
                    self.phase = Phase::OptionHeader;
                    self.option(option, &data, catalog)
                }
                None => Step::Receive,
            },
            Phase::Skip { option, remaining } => self.skip(option, remaining),
        }
    }

    fn consume(&mut self, length: usize) -> Option<Vec<u8>> {
        if self.input.len() < length {
            return None;
        }
        let rest = self.input.split_off(length);
        Some(std::mem::replace(&mut self.input, rest))
    }

    fn client_flags(&mut self) -> Step {
        let Some(bytes) = self.consume(4) else {
            return Step::Receive;
        };
        let flags = match u16::try_from(be_u32(&bytes, 0))
            .ok()
            .and_then(HandshakeFlags::from_bits)
        {
            Some(flags) => flags,
            None => return Step::Close(CloseReason::Violation("unknown client flags")),
        };
        self.fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        self.phase = Phase::OptionHeader;
        Step::Answered
    }

    fn option_header(&mut self) -> Step {
        let Some(header) = self.consume(OPTION_HEADER) else {
            return Step::Receive;
        };
        if be_u64(&header, 0) != OPTION_MAGIC {
            return Step::Close(CloseReason::Violation("wrong magic of an option"));
        }
        let (option, length) = (be_u32(&header, 8), be_u32(&header, 12));
        if length > MAX_PAYLOAD {
            return Step::Close(CloseReason::Violation("option data is too long"));
        }
        let length = length as usize;
        self.phase = if length > MAX_OPTION_LENGTH {
            Phase::Skip {
                option,
                remaining: length,
            }
        } else {
            Phase::OptionData { option, length }
        };
        Step::Answered
    }

    fn skip(&mut self, option: u32, remaining: usize) -> Step {
        let taken = remaining.min(self.input.len());
        self.input.drain(..taken);
        if taken < remaining {
            self.phase = Phase::Skip {
                option,
                remaining: remaining - taken,
            };
            return Step::Receive;
        }
        self.phase = Phase::OptionHeader;
        match option {
            opt::EXPORT_NAME => Step::Close(CloseReason::Violation("export name is too long")),
            opt::ABORT => self.abort(),
            _ => {
                let refusal = Refusal::new(rep::ERR_TOO_BIG, "option data is too long");
                self.negotiation.refuse(option, &refusal);
                Step::Answered
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog) -> Step {
        if !self.fixed && option != opt::EXPORT_NAME {
            return Step::Close(CloseReason::Violation("option needs fixed newstyle"));
        }
        match option {
            opt::EXPORT_NAME => self.export_name(data, catalog),
            opt::ABORT => self.abort(),
            _ => match self.negotiation.answer(option, data, catalog) {
                Some(session) => Step::Enter(session),
                None => Step::Answered,
            },
        }
    }

    fn export_name(&mut self, data: &[u8], catalog: &dyn Catalog) -> Step {
        if data.len() > MAX_STRING_LENGTH {
            return Step::Close(CloseReason::Violation("export name is too long"));
        }
        if self.negotiation.mode() == ReplyMode::Extended {
            return Step::Close(CloseReason::Violation(
                "NBD_OPT_EXPORT_NAME with extended headers",
            ));
        }
        let found = parse_string(data)
            .ok()
            .and_then(|name| catalog.find(&name).map(|export| (name, export)));
        let Some((name, export)) = found else {
            return Step::Close(CloseReason::UnknownExport);
        };
        let session = self.negotiation.session(name, &export);
        let output = &mut self.negotiation.output;
        output.extend(session.size.to_be_bytes());
        output.extend(session.flags.bits().to_be_bytes());
        if !self.no_zeroes {
            output.extend([0; 124]);
        }
        Step::Enter(session)
    }

    fn abort(&mut self) -> Step {
        self.negotiation.acknowledge(opt::ABORT);
        Step::Close(CloseReason::Aborted)
    }
}

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(field)
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(field)
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;

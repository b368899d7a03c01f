//! Fixed newstyle handshake, the server's side.

use super::meta_context::{self, SelectedContext};
use super::option::{
    InfoOption, MAX_OPTION_LENGTH, MAX_STRING_LENGTH, MetaContextOption, Refusal, parse_string,
};
use super::protocol::{
    GREETING_MAGIC, HandshakeFlags, MAX_PAYLOAD, OPTION_MAGIC, OPTION_REPLY_MAGIC, ReplyMode, info,
    opt, rep,
};
use super::session::{Catalog, ExportInfo, Session};

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
    output: Vec<u8>,
    no_zeroes: bool,
    fixed: bool,
    mode: ReplyMode,
    /// Export name and what was selected for it.
    contexts: Option<(String, Vec<SelectedContext>)>,
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
        let mut output = Vec::with_capacity(18);
        output.extend(GREETING_MAGIC.to_be_bytes());
        output.extend(OPTION_MAGIC.to_be_bytes());
        output.extend(HandshakeFlags::all().bits().to_be_bytes());
        Self {
            phase: Phase::ClientFlags,
            input: Vec::new(),
            output,
            no_zeroes: false,
            fixed: false,
            mode: ReplyMode::Simple,
            contexts: None,
        }
    }

    /// Bytes received from the client. Call [`step`](Self::step) until it wants more before the next call: this is what
    /// bounds the memory.
    pub fn input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes to be sent to the client.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
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
            _ => self.refuse(
                option,
                &Refusal::new(rep::ERR_TOO_BIG, "option data is too long"),
            ),
        }
    }

    fn option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog) -> Step {
        if !self.fixed && option != opt::EXPORT_NAME {
            return Step::Close(CloseReason::Violation("option needs fixed newstyle"));
        }
        let answer = match option {
            opt::EXPORT_NAME => return self.export_name(data, catalog),
            opt::ABORT => return self.abort(),
            opt::INFO | opt::GO => match self.info(option, data, catalog) {
                Ok(Some(session)) => return Step::Enter(session),
                Ok(None) => Ok(()),
                Err(refusal) => Err(refusal),
            },
            opt::LIST => self.list(data, catalog),
            opt::STARTTLS => {
                expect_no_data(data).and(Err(Refusal::new(rep::ERR_POLICY, "TLS not configured")))
            }
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => self.reply_mode(option, data),
            opt::LIST_META_CONTEXT => self.list_contexts(data, catalog),
            opt::SET_META_CONTEXT => self.set_contexts(data, catalog),
            _ => Err(Refusal::new(
                rep::ERR_UNSUP,
                format!("unsupported option {option}"),
            )),
        };
        match answer {
            Ok(()) => Step::Answered,
            Err(refusal) => self.refuse(option, &refusal),
        }
    }

    fn export_name(&mut self, data: &[u8], catalog: &dyn Catalog) -> Step {
        if data.len() > MAX_STRING_LENGTH {
            return Step::Close(CloseReason::Violation("export name is too long"));
        }
        if self.mode == ReplyMode::Extended {
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
        let session = self.session(name, &export);
        self.output.extend(session.size.to_be_bytes());
        self.output.extend(session.flags.bits().to_be_bytes());
        if !self.no_zeroes {
            self.output.extend([0; 124]);
        }
        Step::Enter(session)
    }

    fn abort(&mut self) -> Step {
        self.reply(opt::ABORT, rep::ACK, &[]);
        Step::Close(CloseReason::Aborted)
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`; the latter gives a session.
    fn info(
        &mut self,
        option: u32,
        data: &[u8],
        catalog: &dyn Catalog,
    ) -> Result<Option<Session>, Refusal> {
        let InfoOption { name, requests } = InfoOption::parse(data)?;
        let export = find(catalog, &name)?;
        let session = self.session(name, &export);
        if requests.contains(&info::NAME) {
            self.reply_info(option, info::NAME, session.export.as_bytes());
        }
        if let Some(description) = &export.description {
            self.reply_info(option, info::DESCRIPTION, description.as_bytes());
        }
        let sizes = [
            export.block_sizes.minimum,
            export.block_sizes.preferred,
            MAX_PAYLOAD,
        ];
        self.reply_info(
            option,
            info::BLOCK_SIZE,
            &sizes.map(u32::to_be_bytes).concat(),
        );
        let size_and_flags = [
            &session.size.to_be_bytes()[..],
            &session.flags.bits().to_be_bytes(),
        ]
        .concat();
        self.reply_info(option, info::EXPORT, &size_and_flags);
        self.reply(option, rep::ACK, &[]);
        Ok((option == opt::GO).then_some(session))
    }

    fn list(&mut self, data: &[u8], catalog: &dyn Catalog) -> Result<(), Refusal> {
        expect_no_data(data)?;
        for (name, description) in catalog.list() {
            let mut payload = Vec::from(length_of(&name).to_be_bytes());
            payload.extend(name.as_bytes());
            payload.extend(description.unwrap_or_default().as_bytes());
            self.reply(opt::LIST, rep::SERVER, &payload);
        }
        self.reply(opt::LIST, rep::ACK, &[]);
        Ok(())
    }

    fn reply_mode(&mut self, option: u32, data: &[u8]) -> Result<(), Refusal> {
        expect_no_data(data)?;
        let mode = if option == opt::EXTENDED_HEADERS {
            ReplyMode::Extended
        } else {
            ReplyMode::Structured
        };
        if self.mode == ReplyMode::Extended && mode == ReplyMode::Structured {
            return Err(Refusal::new(
                rep::ERR_EXT_HEADER_REQD,
                "extended headers already negotiated",
            ));
        }
        if self.mode >= mode {
            return Err(Refusal::invalid("option already negotiated"));
        }
        self.mode = mode;
        self.reply(option, rep::ACK, &[]);
        Ok(())
    }

    fn list_contexts(&mut self, data: &[u8], catalog: &dyn Catalog) -> Result<(), Refusal> {
        let option = self.context_option(data)?;
        let export = find(catalog, &option.name)?;
        for name in meta_context::list(&export.contexts, &option.queries) {
            self.reply_context(opt::LIST_META_CONTEXT, 0, name);
        }
        self.reply(opt::LIST_META_CONTEXT, rep::ACK, &[]);
        Ok(())
    }

    fn set_contexts(&mut self, data: &[u8], catalog: &dyn Catalog) -> Result<(), Refusal> {
        self.contexts = None;
        let option = self.context_option(data)?;
        let export = find(catalog, &option.name)?;
        let selected = meta_context::select(&export.contexts, &option.queries);
        for context in &selected {
            self.reply_context(opt::SET_META_CONTEXT, context.id, &context.name);
        }
        self.contexts = Some((option.name, selected));
        self.reply(opt::SET_META_CONTEXT, rep::ACK, &[]);
        Ok(())
    }

    fn context_option(&self, data: &[u8]) -> Result<MetaContextOption, Refusal> {
        if self.mode == ReplyMode::Simple {
            return Err(Refusal::invalid(
                "metadata contexts need structured replies",
            ));
        }
        MetaContextOption::parse(data)
    }

    fn session(&self, name: String, export: &ExportInfo) -> Session {
        let contexts = match &self.contexts {
            Some((selected_for, contexts)) if *selected_for == name => contexts.clone(),
            _ => Vec::new(),
        };
        let flags = export.transmission_flags(self.mode);
        Session {
            export: name,
            size: export.size,
            flags,
            mode: self.mode,
            contexts,
        }
    }

    fn refuse(&mut self, option: u32, refusal: &Refusal) -> Step {
        self.reply(option, refusal.reply, refusal.text.as_bytes());
        Step::Answered
    }

    fn reply_info(&mut self, option: u32, kind: u16, payload: &[u8]) {
        self.reply(
            option,
            rep::INFO,
            &[&kind.to_be_bytes()[..], payload].concat(),
        );
    }

    fn reply_context(&mut self, option: u32, id: u32, name: &str) {
        self.reply(
            option,
            rep::META_CONTEXT,
            &[&id.to_be_bytes()[..], name.as_bytes()].concat(),
        );
    }

    fn reply(&mut self, option: u32, reply: u32, payload: &[u8]) {
        self.output.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend(option.to_be_bytes());
        self.output.extend(reply.to_be_bytes());
        self.output.extend(length_of(payload).to_be_bytes());
        self.output.extend(payload);
    }
}

fn find(catalog: &dyn Catalog, name: &str) -> Result<ExportInfo, Refusal> {
    catalog.find(name).ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        Refusal::new(rep::ERR_UNKNOWN, format!("export '{shown}' not present"))
    })
}

fn expect_no_data(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() {
        Ok(())
    } else {
        Err(Refusal::invalid("option takes no data"))
    }
}

/// Length of something that goes into a reply. Names and texts are short by the rules of [`Catalog`].
fn length_of(bytes: impl AsRef<[u8]>) -> u32 {
    match u32::try_from(bytes.as_ref().len()) {
        Ok(length) if length <= MAX_PAYLOAD => length,
        _ => unreachable!("names and texts of an export are bounded when it is made"),
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

//! Answers to options: what has been negotiated so far, and the replies that say so.

use super::meta_context::{self, SelectedContext};
use super::option::{InfoOption, MetaContextOption, Refusal};
use super::protocol::{MAX_PAYLOAD, OPTION_REPLY_MAGIC, ReplyMode, info, opt, rep};
use super::session::{Catalog, ExportInfo, Session};

/// What the client asked for and got, before it chooses its export; and the bytes to be sent to it.
#[derive(Debug)]
pub(super) struct Negotiation {
    mode: ReplyMode,
    /// Export name and what was selected for it.
    contexts: Option<(String, Vec<SelectedContext>)>,
    pub(super) output: Vec<u8>,
}

impl Negotiation {
    /// Nothing negotiated.
    pub(super) fn new() -> Self {
        Self {
            mode: ReplyMode::Simple,
            contexts: None,
            output: Vec::new(),
        }
    }

    /// Shape of the transmission phase so far.
    pub(super) fn mode(&self) -> ReplyMode {
        self.mode
    }

    /// Answer an option that has replies; `NBD_OPT_GO` gives a session if all is well.
    pub(super) fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        catalog: &dyn Catalog,
    ) -> Option<Session> {
        let answer = match option {
            opt::INFO | opt::GO => self.info(option, data, catalog),
            opt::LIST => self.list(data, catalog).map(|()| None),
            opt::STARTTLS => Err(expect_no_data(data)
                .err()
                .unwrap_or_else(|| Refusal::new(rep::ERR_POLICY, "TLS not configured"))),
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                self.reply_mode(option, data).map(|()| None)
            }
            opt::LIST_META_CONTEXT => self.list_contexts(data, catalog).map(|()| None),
            opt::SET_META_CONTEXT => self.set_contexts(data, catalog).map(|()| None),
            _ => Err(Refusal::new(
                rep::ERR_UNSUP,
                format!("unsupported option {option}"),
            )),
        };
        answer.unwrap_or_else(|refusal| {
            self.refuse(option, &refusal);
            None
        })
    }

    /// Reply that ends an option's replies with success.
    pub(super) fn acknowledge(&mut self, option: u32) {
        self.reply(option, rep::ACK, &[]);
    }

    /// Reply that ends an option's replies with an error.
    pub(super) fn refuse(&mut self, option: u32, refusal: &Refusal) {
        self.reply(option, refusal.reply, refusal.text.as_bytes());
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
        self.acknowledge(option);
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
        self.acknowledge(opt::LIST);
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
        self.acknowledge(option);
        Ok(())
    }

    fn list_contexts(&mut self, data: &[u8], catalog: &dyn Catalog) -> Result<(), Refusal> {
        let option = self.context_option(data)?;
        let export = find(catalog, &option.name)?;
        for name in meta_context::list(&export.contexts, &option.queries) {
            self.reply_context(opt::LIST_META_CONTEXT, 0, name);
        }
        self.acknowledge(opt::LIST_META_CONTEXT);
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
        self.acknowledge(opt::SET_META_CONTEXT);
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

    /// The session with this export, as far as negotiated.
    pub(super) fn session(&self, name: String, export: &ExportInfo) -> Session {
        let contexts = match &self.contexts {
            Some((selected_for, contexts)) if *selected_for == name && export.offers(contexts) => {
                contexts.clone()
            }
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

//! Carrying out the command line's options, strictly in their order.

use std::collections::HashMap;
use std::rc::Rc;

use super::command_line::Item;
use super::pid_file::PidFile;
use crate::qmp::chardev::{self, Backend, Chardev, Role};
use crate::qmp::commands::Context;
use crate::qmp::endpoint::Endpoint;
use crate::qmp::error::QmpError;
use crate::qmp::json::Style;
use crate::qmp::keyval::{Keyval, parse_option};
use crate::qmp::monitor::Monitor;
use crate::qmp::schema::{Args, option};
use crate::runtime::Handle;

/// What has been set up.
pub(super) struct Startup {
    handle: Handle,
    context: Rc<Context>,
    /// Taken out by the monitor that uses it.
    endpoints: HashMap<String, Option<Endpoint>>,
    stdio_taken: bool,
    /// Monitors that nobody is answered on before all is set up.
    waiting: Vec<(Endpoint, Style)>,
    pub(super) monitors: Vec<Rc<Monitor>>,
    pid_file: Option<String>,
}

/// What follows from an option.
pub(super) enum Outcome {
    /// On to the next.
    Continue,
    /// This was asked for instead of serving.
    Show(String),
}

impl Startup {
    pub(super) fn new(handle: &Handle, context: &Rc<Context>) -> Startup {
        Startup {
            handle: handle.clone(),
            context: context.clone(),
            endpoints: HashMap::new(),
            stdio_taken: false,
            waiting: Vec::new(),
            monitors: Vec::new(),
            pid_file: None,
        }
    }

    /// Carries out one option.
    ///
    /// # Errors
    /// What the same thing would say over QMP.
    pub(super) async fn apply(&mut self, item: &Item) -> Result<Outcome, QmpError> {
        match item {
            Item::Blockdev(text) => {
                let arguments = parse_option(text, Some("driver"), &option::BLOCKDEV)?;
                self.context.execute("blockdev-add", arguments).await?;
            }
            Item::Export(text) => {
                let arguments = parse_option(text, Some("type"), &option::EXPORT)?;
                self.context.execute("block-export-add", arguments).await?;
            }
            Item::NbdServer(text) => {
                let options = parse_option(text, None, &option::NBD_SERVER)?;
                self.context.start_nbd_server(&options).await?;
            }
            Item::Object(text) => return self.object(text).await,
            Item::Chardev(text) => return self.chardev(text, &item.place()).await,
            Item::Monitor(text) => self.monitor(text)?,
            Item::PidFile(path) => self.pid_file = Some(path.clone()),
            // It was set before anything was opened.
            Item::StateDirectory(_) | Item::Daemonize => {}
        }
        Ok(Outcome::Continue)
    }

    /// All options were carried out: clients are answered from now on, and the PID file is written.
    ///
    /// # Errors
    /// As [`PidFile::create`].
    pub(super) fn finish(&mut self) -> Result<Option<PidFile>, String> {
        for (endpoint, style) in std::mem::take(&mut self.waiting) {
            let commands = self.context.clone();
            let events = self.context.events().clone();
            let monitor = Monitor::start(&self.handle, commands, events, endpoint, style);
            self.monitors.push(monitor);
        }
        self.pid_file.as_deref().map(PidFile::create).transpose()
    }

    async fn object(&self, text: &str) -> Result<Outcome, QmpError> {
        let json = text.starts_with('{');
        if !json && Keyval::parse(text, Some("qom-type"))?.help {
            let names = option::object_types().iter();
            let list: String = names.map(|name| format!("\n  {name}")).collect();
            return Ok(Outcome::Show(format!(
                "List of user creatable objects:{list}"
            )));
        }
        let arguments = parse_option(text, Some("qom-type"), &option::OBJECT)?;
        self.context.execute("object-add", arguments).await?;
        Ok(Outcome::Continue)
    }

    async fn chardev(&mut self, text: &str, place: &str) -> Result<Outcome, QmpError> {
        if chardev::asks_for_help(text) {
            let list: String = chardev::BACKENDS
                .iter()
                .map(|name| format!("\n  {name}"))
                .collect();
            return Ok(Outcome::Show(format!(
                "Available chardev backend types: {list}"
            )));
        }
        let chardev = Chardev::parse(text, |warning| {
            super::report(&format!("{place}: warning: {warning}"))
        })?;
        if self.endpoints.contains_key(&chardev.id) {
            let id = &chardev.id;
            let text =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(QmpError::generic(text));
        }
        if chardev.backend == Backend::Stdio && std::mem::replace(&mut self.stdio_taken, true) {
            let text = "cannot use stdio by multiple character devices";
            return Err(QmpError::generic(text));
        }
        let mut endpoint = Endpoint::open(&chardev.backend)?;
        if let Backend::Socket {
            role: Role::Server { wait: true },
            ..
        } = chardev.backend
        {
            super::report(&format!("{place}: info: waiting for a client to connect"));
            endpoint = endpoint.with_first_client(&self.handle).await?;
        }
        self.endpoints.insert(chardev.id, Some(endpoint));
        Ok(Outcome::Continue)
    }

    fn monitor(&mut self, text: &str) -> Result<(), QmpError> {
        let options = parse_option(text, Some("chardev"), &option::MONITOR)?;
        let options = Args::new(&options);
        if options.str("mode") == Some("readline") {
            return Err(QmpError::generic("Only QMP is supported"));
        }
        let id = options.required_str("chardev");
        let endpoint = match self.endpoints.get_mut(id) {
            None => return Err(QmpError::generic(format!("chardev \"{id}\" not found"))),
            Some(endpoint) => endpoint.take(),
        };
        let Some(endpoint) = endpoint else {
            let text = format!("chardev '{id}' is already in use");
            return Err(QmpError::generic(text));
        };
        let style = match options.bool("pretty") {
            Some(true) => Style::Pretty,
            _ => Style::Line,
        };
        self.waiting.push((endpoint, style));
        Ok(())
    }
}

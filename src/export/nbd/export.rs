//! One node exported over NBD.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use crate::block::{BusyBitmap, Child};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Export, ExportSpec, ExportType, LocalFuture};
use crate::nbd::{BlockSizes, ExportInfo, MAX_STRING_LENGTH, SelectedContext};
use crate::runtime::sync::Notify;

use super::context::{BitmapReference, Context};
use super::server::Shared;
use super::socket::Socket;

/// Alignment in bytes at which requests cost least, as told to clients.
const PREFERRED_BLOCK_SIZE: u32 = 4096;

/// What an NBD export is added with.
#[derive(Clone, Debug)]
pub struct NbdExportSpec {
    /// What every export has.
    pub common: ExportSpec,
    /// Name for clients; the node's name if none is given.
    pub name: Option<String>,
    /// Description for clients.
    pub description: Option<String>,
    /// Offer the metadata context `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Offer the metadata context `qemu:dirty-bitmap:NAME` of each.
    pub bitmaps: Vec<BitmapReference>,
    /// Every write is durable when answered.
    pub writethrough: bool,
}

/// A node exported over NBD.
pub struct NbdExport {
    id: String,
    name: String,
    description: Option<String>,
    root: Rc<Child>,
    writable: bool,
    writethrough: bool,
    contexts: Vec<Context>,
    server: Weak<Shared>,
    clients: RefCell<Vec<Rc<Socket>>>,
    client_gone: Notify,
    closed: Cell<bool>,
}

impl NbdExport {
    pub(super) fn new(
        spec: NbdExportSpec,
        root: Rc<Child>,
        bitmaps: Vec<BusyBitmap>,
        server: &Rc<Shared>,
    ) -> Self {
        let mut contexts = vec![Context::Allocation];
        if spec.allocation_depth {
            contexts.push(Context::AllocationDepth);
        }
        contexts.extend(bitmaps.into_iter().map(Context::DirtyBitmap));
        Self {
            name: spec.client_name().to_owned(),
            id: spec.common.id,
            description: spec.description,
            root,
            writable: spec.common.writable,
            writethrough: spec.writethrough,
            contexts,
            server: Rc::downgrade(server),
            clients: RefCell::default(),
            client_gone: Notify::new(),
            closed: Cell::new(false),
        }
    }

    /// The name by which clients choose it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Clients in the transmission phase.
    pub fn clients(&self) -> usize {
        self.clients.borrow().len()
    }

    pub(super) fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    pub(super) fn is_writethrough(&self) -> bool {
        self.writethrough
    }

    /// The context that a client selected; its id is the place in what was offered.
    pub(super) fn context(&self, selected: &SelectedContext) -> &Context {
        &self.contexts[selected.id as usize]
    }

    /// What the handshake tells about it.
    pub(super) fn info(&self, multi_conn: bool) -> ExportInfo {
        ExportInfo {
            description: self.description.clone(),
            size: self.root.node().size(),
            read_only: !self.writable,
            multi_conn,
            block_sizes: BlockSizes {
                minimum: 1,
                preferred: PREFERRED_BLOCK_SIZE,
            },
            contexts: self.contexts.iter().map(Context::name).collect(),
        }
    }

    /// Count a client that enters the transmission phase, as long as the guard lives.
    pub(super) fn enter(self: &Rc<Self>, socket: &Rc<Socket>) -> ClientGuard {
        if self.closed.get() {
            socket.shut_down();
        }
        self.clients.borrow_mut().push(socket.clone());
        ClientGuard {
            export: self.clone(),
            socket: socket.clone(),
        }
    }

    async fn disconnect(&self) {
        self.closed.set(true);
        if let Some(server) = self.server.upgrade() {
            server.forget(self);
        }
        for socket in &*self.clients.borrow() {
            socket.shut_down();
        }
        while self.clients() > 0 {
            self.client_gone.notified().await;
        }
    }
}

impl Export for NbdExport {
    fn id(&self) -> &str {
        &self.id
    }

    fn export_type(&self) -> ExportType {
        ExportType::Nbd
    }

    fn root(&self) -> &Rc<Child> {
        &self.root
    }

    fn is_in_use(&self) -> bool {
        self.clients() > 0
    }

    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(self.disconnect())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A client of an export, from the end of its handshake until its last request is answered.
pub(super) struct ClientGuard {
    export: Rc<NbdExport>,
    socket: Rc<Socket>,
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        self.export
            .clients
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, &self.socket));
        self.export.client_gone.notify_all();
    }
}

impl NbdExportSpec {
    /// The name for clients.
    pub(super) fn client_name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.common.node_name)
    }

    /// Check that strings fit in the protocol.
    pub(super) fn check_lengths(&self) -> Result<()> {
        let name = self.client_name();
        if name.len() > MAX_STRING_LENGTH {
            return Err(too_long("export name", name));
        }
        match &self.description {
            Some(text) if text.len() > MAX_STRING_LENGTH => Err(too_long("description", text)),
            _ => Ok(()),
        }
    }
}

fn too_long(what: &str, value: &str) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("{what} '{value}' too long"),
    )
}

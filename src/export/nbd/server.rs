//! The server: sockets it listens on, exports by name, clients.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::export::Exports;
use crate::nbd::{Catalog, ExportInfo};
use crate::runtime::ring::RingFile;
use crate::runtime::sync::{Notify, Semaphore};
use crate::runtime::{Handle, Task, remove_socket};

use super::ServerAddress;
use super::address::{Bound, Listener};
use super::client;
use super::context::occupy_bitmaps;
use super::export::{NbdExport, NbdExportSpec};
use super::payload::Payloads;
use super::socket::Socket;

/// How long to wait after a connection could not be accepted (no descriptors left, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct NbdServerOptions {
    /// Where it listens.
    pub address: ServerAddress,
    /// Most clients at a time, 0 for no limit. At the limit others wait to be accepted.
    pub max_connections: u32,
    /// Time a client has for its handshake.
    pub handshake_limit: Option<Duration>,
}

/// A server that runs. [`stop`](Self::stop) it: dropped, it would go on.
pub struct NbdServer {
    shared: Rc<Shared>,
    listening: Vec<Task<()>>,
    bound: Vec<Bound>,
}

/// What listeners, clients and exports share.
pub(super) struct Shared {
    pub(super) handle: Handle,
    pub(super) handshake_limit: Option<Duration>,
    pub(super) payloads: Payloads,
    multi_conn: bool,
    /// Connections that may still be made; none if there is no limit.
    connections: Option<Rc<Semaphore>>,
    exports: RefCell<Vec<Rc<NbdExport>>>,
    clients: RefCell<Vec<Rc<Socket>>>,
    client_gone: Notify,
    stopped: Cell<bool>,
}

impl NbdServer {
    /// Listen and accept clients.
    ///
    /// # Errors
    ///
    /// The address cannot be resolved or bound.
    pub async fn start(handle: &Handle, options: NbdServerOptions) -> Result<Self> {
        let address = options.address;
        let listeners = handle.blocking(move || address.listen()).await?;
        let limit = options.max_connections as usize;
        let shared = Rc::new(Shared {
            handle: handle.clone(),
            handshake_limit: options.handshake_limit,
            payloads: Payloads::new(),
            multi_conn: limit != 1,
            connections: (limit > 0).then(|| Rc::new(Semaphore::new(limit))),
            exports: RefCell::default(),
            clients: RefCell::default(),
            client_gone: Notify::new(),
            stopped: Cell::new(false),
        });
        let bound = listeners
            .iter()
            .map(|listener| listener.bound.clone())
            .collect();
        let listening = listeners
            .into_iter()
            .map(|listener| listen(&shared, listener))
            .collect();
        Ok(Self {
            shared,
            listening,
            bound,
        })
    }

    /// TCP addresses it listens at; the ports are the real ones.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        let inet = |bound: &Bound| match bound {
            Bound::Inet(address) => Some(*address),
            Bound::Unix(_) => None,
        };
        self.bound.iter().filter_map(inet).collect()
    }

    /// Export a node, and register the export.
    ///
    /// # Errors
    ///
    /// As [`Exports::check`]; the name or description is too long, or the name taken; a bitmap is not there or
    /// cannot be used; permissions are in the way.
    pub fn add(&self, exports: &Exports, spec: NbdExportSpec) -> Result<Rc<NbdExport>> {
        let node = exports.check(&spec.common)?;
        spec.check_lengths()?;
        if self.shared.find(spec.client_name()).is_some() {
            let text = format!(
                "NBD server already has export named '{}'",
                spec.client_name()
            );
            return Err(Error::new(ErrorKind::InUse, text));
        }
        let (graph, writable) = (exports.graph(), spec.common.writable);
        let bitmaps = occupy_bitmaps(graph, &node, writable, &spec.bitmaps)?;
        let root = exports.attach(&node, writable, false)?;
        let export = Rc::new(NbdExport::new(spec, root, bitmaps, &self.shared));
        self.shared.exports.borrow_mut().push(export.clone());
        exports.insert(export.clone());
        Ok(export)
    }

    /// Disconnect all clients, remove this server's exports and stop listening.
    pub async fn stop(self, exports: &Exports) {
        self.shared.stopped.set(true);
        for task in self.listening {
            task.abort();
        }
        for socket in &*self.shared.clients.borrow() {
            socket.shut_down();
        }
        exports
            .remove_all(|export| export.as_any().is::<NbdExport>())
            .await;
        while !self.shared.clients.borrow().is_empty() {
            self.shared.client_gone.notified().await;
        }
        for bound in &self.bound {
            if let Bound::Unix(path) = bound
                && let Err(error) = remove_socket(path)
            {
                tracing::warn!(path = %path.display(), %error, "socket could not be removed");
            }
        }
    }
}

impl Shared {
    /// The export of that name.
    pub(super) fn find(&self, name: &str) -> Option<Rc<NbdExport>> {
        self.exports
            .borrow()
            .iter()
            .find(|export| export.name() == name)
            .cloned()
    }

    /// No client may choose the export any more.
    pub(super) fn forget(&self, export: &NbdExport) {
        self.exports
            .borrow_mut()
            .retain(|other| !std::ptr::eq(&**other, export));
    }

    fn remove_client(&self, socket: &Rc<Socket>) {
        self.clients
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, socket));
        self.client_gone.notify_all();
    }
}

impl Catalog for Shared {
    fn list(&self) -> Vec<(String, Option<String>)> {
        let entry = |export: &Rc<NbdExport>| {
            (
                export.name().to_owned(),
                export.description().map(Into::into),
            )
        };
        self.exports.borrow().iter().map(entry).collect()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.find(name).map(|export| export.info(self.multi_conn))
    }
}

fn listen(shared: &Rc<Shared>, listener: Listener) -> Task<()> {
    let file = shared.handle.ring().file(listener.descriptor);
    shared.handle.spawn(accept_all(shared.clone(), file))
}

async fn accept_all(shared: Rc<Shared>, listener: Rc<RingFile>) {
    loop {
        let permit = match &shared.connections {
            Some(connections) => Some(connections.acquire_owned(1).await),
            None => None,
        };
        match shared.handle.ring().accept(&listener).await {
            Ok(descriptor) => {
                let client = serve(shared.clone(), descriptor);
                let client = async move {
                    client.await;
                    drop(permit);
                };
                shared.handle.spawn(client).detach();
            }
            Err(error) => {
                tracing::warn!(%error, "NBD client not accepted");
                shared.handle.sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve(shared: Rc<Shared>, descriptor: OwnedFd) {
    let socket = Rc::new(Socket::new(shared.handle.clone(), descriptor));
    if shared.stopped.get() {
        return;
    }
    shared.clients.borrow_mut().push(socket.clone());
    client::serve(&shared, &socket).await;
    socket.shut_down();
    shared.remove_client(&socket);
}

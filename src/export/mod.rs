//! Nodes shown outside: the registry of exports, and what they have in common.
//!
//! An [`Export`] holds a root edge into the block graph and answers requests from outside with it. When the graph
//! changes (a snapshot, a pivot) the edge is moved, and the export serves the new active layer without noticing. What
//! serves and how is each type's own: [`nbd`]. This module knows no QMP; ids and texts are those of `block-export-add`.
//!
//! Invariants:
//!
//! 1. An id names at most one export, also while that is shutting down.
//! 2. An export is gone (its edge detached, its deletion announced) only after its last request was answered.

pub mod nbd;
#[cfg(feature = "ublk")]
pub mod ublk;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use crate::block::{Child, Graph, Node, Permission, Permissions, is_well_formed};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::sync::Notify;
use crate::runtime::{Handle, Task};

/// How messages call the user behind an export's edge.
const EDGE_DESCRIPTION: &str = "an unnamed block device";

/// A future on the export's own thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What serves an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportType {
    /// Over NBD.
    Nbd,
    /// As a ublk block device.
    Ublk,
}

impl ExportType {
    /// The name in QMP and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Ublk => "ublk",
        }
    }
}

/// A node shown outside.
pub trait Export: Any {
    /// The id it was added with.
    fn id(&self) -> &str;

    /// What serves it.
    fn export_type(&self) -> ExportType;

    /// Its edge into the graph.
    fn root(&self) -> &Rc<Child>;

    /// Whether somebody outside uses it now, so that only a hard removal is allowed.
    fn is_in_use(&self) -> bool;

    /// The node may have another size: tell whoever is served. Clients of NBD learn it with their next connection.
    ///
    /// # Errors
    ///
    /// The users cannot be told; they keep the size that they know, and are not told of it again.
    fn update_size(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Stop serving: no new requests, users disconnected; done when every request in flight is answered. Called once.
    fn close(&self) -> LocalFuture<'_, ()>;

    /// The export as its own type, for who knows it.
    fn as_any(&self) -> &dyn Any;
}

/// What every export is added with.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// Unique name of the export.
    pub id: String,
    /// Node to export.
    pub node_name: String,
    /// Whether users may write.
    pub writable: bool,
}

/// What removal does about users.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RemoveMode {
    /// Fail if there are any.
    #[default]
    Safe,
    /// Disconnect them.
    Hard,
}

/// State of an export, as queries show it.
#[derive(Clone)]
pub struct ExportStatus {
    /// The export.
    pub export: Rc<dyn Export>,
    /// It was removed, but is still answering its last requests.
    pub shutting_down: bool,
}

/// All exports of one I/O thread. Cheap to clone: a handle.
#[derive(Clone)]
pub struct Exports {
    inner: Rc<Inner>,
}

struct Inner {
    handle: Handle,
    graph: Graph,
    entries: RefCell<Vec<Rc<Entry>>>,
    sinks: RefCell<Vec<DeletedSink>>,
    gone: Notify,
}

type DeletedSink = Box<dyn Fn(&str)>;

struct Entry {
    export: Rc<dyn Export>,
    shutting_down: Cell<bool>,
}

impl Exports {
    /// No exports yet, of nodes in `graph`.
    pub fn new(handle: Handle, graph: Graph) -> Self {
        let inner = Inner {
            handle,
            graph,
            entries: RefCell::default(),
            sinks: RefCell::default(),
            gone: Notify::new(),
        };
        Self {
            inner: Rc::new(inner),
        }
    }

    /// The runtime that exports run on.
    pub fn handle(&self) -> &Handle {
        &self.inner.handle
    }

    /// The graph whose nodes are exported.
    pub fn graph(&self) -> &Graph {
        &self.inner.graph
    }

    /// Calls `sink` with the id of each export that is gone (`BLOCK_EXPORT_DELETED`).
    pub fn on_deleted(&self, sink: impl Fn(&str) + 'static) {
        self.inner.sinks.borrow_mut().push(Box::new(sink));
    }

    /// Check what is common to all types, and find the node.
    ///
    /// # Errors
    ///
    /// The id is malformed or taken, the node does not exist, or it is read-only and writes are asked for.
    pub fn check(&self, spec: &ExportSpec) -> Result<Rc<Node>> {
        let refuse = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        if !is_well_formed(&spec.id) {
            return refuse("Invalid block export id".into());
        }
        if self.entry(&spec.id).is_some() {
            return refuse(format!("Block export id '{}' is already in use", spec.id));
        }
        let Some(node) = self.inner.graph.find(&spec.node_name) else {
            let text = format!("Cannot find device='' nor node-name='{}'", spec.node_name);
            return Err(Error::new(ErrorKind::NotFound, text));
        };
        if spec.writable && node.options().read_only {
            return refuse("Cannot export read-only node as writable".into());
        }
        if spec.writable {
            // A job's filter would not see these writes.
            node.check_unoccupied()?;
        }
        if node.users().shared.contains(Permission::CONSISTENT_READ) {
            // Else permissions are in the way, in QEMU's words.
            node.check_content_stays()?;
        }
        Ok(node)
    }

    /// An export's edge: reads, and writes if `writable`; others may do the same, and resize only if `share_resize`.
    ///
    /// # Errors
    ///
    /// Another user's permissions are in the way.
    pub fn attach(&self, node: &Rc<Node>, writable: bool, share_resize: bool) -> Result<Rc<Child>> {
        let mut permissions = Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::all(),
        };
        permissions.required.set(Permission::WRITE, writable);
        permissions.shared.set(Permission::RESIZE, share_resize);
        self.inner
            .graph
            .attach_root(EDGE_DESCRIPTION, node, permissions)
    }

    /// Register an export that has passed [`check`](Self::check) and serves from now on.
    pub fn insert(&self, export: Rc<dyn Export>) {
        assert!(
            self.entry(export.id()).is_none(),
            "export id was not checked"
        );
        let entry = Entry {
            export,
            shutting_down: Cell::new(false),
        };
        self.inner.entries.borrow_mut().push(Rc::new(entry));
    }

    /// All exports, newest first.
    pub fn list(&self) -> Vec<ExportStatus> {
        let entries = self.inner.entries.borrow();
        entries.iter().rev().map(|entry| entry.status()).collect()
    }

    /// The export of that id.
    pub fn find(&self, id: &str) -> Option<ExportStatus> {
        self.entry(id).map(|entry| entry.status())
    }

    /// Remove an export. If it has users (in [`RemoveMode::Hard`]) it goes on closing after the return; otherwise it is
    /// gone.
    ///
    /// # Errors
    ///
    /// There is no such export, it is in use, or it is being removed already.
    pub async fn remove(&self, id: &str, mode: RemoveMode) -> Result<()> {
        let Some(entry) = self.entry(id) else {
            let text = format!("Export '{id}' is not found");
            return Err(Error::new(ErrorKind::NotFound, text));
        };
        check_not_closing(&entry)?;
        let in_use = match mode {
            RemoveMode::Safe => self.stays_in_use(&entry).await,
            RemoveMode::Hard => entry.export.is_in_use(),
        };
        check_not_closing(&entry)?;
        if in_use && mode == RemoveMode::Safe {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("export '{id}' still in use"),
            ));
        }
        let closing = self.start_closing(entry);
        if !in_use {
            closing.await;
        }
        Ok(())
    }

    /// Whether the export has a user; of a disk, one who does not leave at once, as udev does.
    async fn stays_in_use(&self, entry: &Entry) -> bool {
        let looks = match entry.export.export_type() {
            ExportType::Nbd => 0,
            ExportType::Ublk => LOOKS,
        };
        for _ in 0..looks {
            if !entry.export.is_in_use() {
                return false;
            }
            self.inner.handle.sleep(LOOK_AGAIN).await;
        }
        entry.export.is_in_use()
    }

    /// Remove every export that `chosen` picks, newest first, users or not; done when they are gone.
    pub async fn remove_all(&self, chosen: impl Fn(&dyn Export) -> bool) {
        let entries: Vec<_> = self.inner.entries.borrow().iter().rev().cloned().collect();
        for entry in entries.into_iter().filter(|entry| chosen(&*entry.export)) {
            if entry.shutting_down.get() {
                while self.entry(entry.export.id()).is_some() {
                    self.inner.gone.notified().await;
                }
            } else {
                self.start_closing(entry).await;
            }
        }
    }

    /// Nodes have changed: tell the users of each export whose size is another now.
    ///
    /// # Errors
    ///
    /// The first that could not be told; all others are told, and what failed is logged.
    pub async fn update_sizes(&self) -> Result<()> {
        let mut result = Ok(());
        for ExportStatus { export, .. } in self.list() {
            let told = export.update_size().await;
            if let Err(error) = &told {
                let (export, size) = (export.id(), export.root().node().size());
                tracing::warn!(export, size, %error, "users keep the size that they know");
            }
            result = result.and(told);
        }
        result
    }

    fn entry(&self, id: &str) -> Option<Rc<Entry>> {
        self.inner
            .entries
            .borrow()
            .iter()
            .find(|entry| entry.export.id() == id)
            .cloned()
    }

    /// Closing is a task of its own: it goes on if nobody waits for it any more.
    fn start_closing(&self, entry: Rc<Entry>) -> Task<()> {
        entry.shutting_down.set(true);
        self.inner.handle.spawn(self.clone().close(entry))
    }

    async fn close(self, entry: Rc<Entry>) {
        entry.export.close().await;
        let id = entry.export.id();
        if let Err(error) = self.inner.graph.detach(entry.export.root()).await {
            tracing::error!(export = id, %error, "node could not be closed after its export");
        }
        self.inner
            .entries
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, &entry));
        for sink in &*self.inner.sinks.borrow() {
            sink(id);
        }
        self.inner.gone.notify_all();
    }
}

impl Entry {
    fn status(&self) -> ExportStatus {
        ExportStatus {
            export: self.export.clone(),
            shutting_down: self.shutting_down.get(),
        }
    }
}

fn check_not_closing(entry: &Entry) -> Result<()> {
    if !entry.shutting_down.get() {
        return Ok(());
    }
    let text = format!("Export '{}' is already shutting down", entry.export.id());
    Err(Error::new(ErrorKind::InUse, text))
}

/// How often, and after what time, the user of a disk is looked for again before it counts as one.
const LOOKS: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

//! The checked edge: all I/O between nodes crosses a [`Child`].

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use nix::errno::Errno;

use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::{ByteRange, is_aligned};

use super::bitmaps::Recording;
use super::delivery::{deliver_discard, deliver_write, deliver_zeroes};
use super::drain::Condition;
use super::padding;
use super::{
    DebugEvent, DetectZeroes, Extent, Forward, InFlight, Limits, Node, Permission, Permissions,
    Transfer, TransferGuard, TransferKind, TruncateOptions, WriteFlags, ZeroFlags,
};

/// What an edge is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// From outside: an export, a job, a monitor command.
    Root,
    /// The image file of a format, or the filtered child.
    File,
    /// The filtered child of `blkdebug`.
    Image,
    /// The backing file.
    Backing,
    /// The external data file.
    DataFile,
    /// What copies go to.
    Target,
    /// The node that a job works for.
    MainNode,
    /// The node that a stream fills.
    ActiveNode,
    /// The node that a job copies from while it follows its users.
    Source,
    /// A node that a job keeps others off.
    IntermediateNode,
    /// The node that a commit goes to.
    Base,
}

impl Role {
    /// The child name in messages and queries.
    pub fn name(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::File => "file",
            Role::Image => "image",
            Role::Backing => "backing",
            Role::DataFile => "data-file",
            Role::Target => "target",
            Role::MainNode => "main node",
            Role::ActiveNode => "active node",
            Role::Source => "source",
            Role::IntermediateNode => "intermediate node",
            Role::Base => "base",
        }
    }
}

/// Who is above an edge.
#[derive(Clone, Debug)]
pub enum Parent {
    /// A node that is being opened, or is open.
    Node {
        /// Its name.
        name: String,
        /// The node, once it is in the graph.
        node: Weak<Node>,
    },
    /// A user of the graph.
    Root {
        /// As messages call it: `an unnamed block device`.
        description: String,
    },
    /// A job that keeps others off a node.
    Job {
        /// Its id.
        id: String,
        /// As messages call it: `commit job 'j1'`.
        description: String,
    },
}

/// An edge of the block graph. Whoever it is for owns it, and gives it back by
/// [`Graph::detach`](super::Graph::detach).
///
/// Requests over a root edge wait at its gate while a drained section holds it. Their futures must be
/// run to the end: a dropped one does not stop its I/O, but is no longer counted, and bitmaps know of it
/// too early. Who may be stopped meanwhile (an export's client, a job) spawns them.
pub struct Child {
    role: Role,
    parent: RefCell<Parent>,
    node: RefCell<Rc<Node>>,
    permissions: Cell<Permissions>,
    in_flight: Rc<Cell<u32>>,
    requests: Cell<u64>,
    serial: u64,
    gates: Cell<u32>,
    changed: Condition,
}

impl Child {
    pub(super) fn new(
        role: Role,
        parent: Parent,
        node: Rc<Node>,
        permissions: Permissions,
        serial: u64,
    ) -> Child {
        Child {
            serial,
            role,
            parent: RefCell::new(parent),
            node: RefCell::new(node),
            permissions: Cell::new(permissions),
            in_flight: Rc::default(),
            requests: Cell::new(0),
            gates: Cell::new(0),
            changed: Condition::default(),
        }
    }

    /// What the edge is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Counts edges: one that was made later has a higher number.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// The job that keeps others off the node by this edge.
    pub fn job(&self) -> Option<String> {
        match &*self.parent.borrow() {
            Parent::Job { id, .. } => Some(id.clone()),
            Parent::Root { .. } | Parent::Node { .. } => None,
        }
    }

    /// The node below.
    pub fn node(&self) -> Rc<Node> {
        self.node.borrow().clone()
    }

    /// The node above; `None` for a root edge, or while that node is being opened.
    pub fn parent_node(&self) -> Option<Rc<Node>> {
        match &*self.parent.borrow() {
            Parent::Node { node, .. } => node.upgrade(),
            Parent::Root { .. } | Parent::Job { .. } => None,
        }
    }

    /// From outside the graph.
    pub fn is_root(&self) -> bool {
        matches!(
            &*self.parent.borrow(),
            Parent::Root { .. } | Parent::Job { .. }
        )
    }

    /// The edge goes along when another node takes the place of the one below: its user wants what the
    /// node shows, not the node.
    pub fn follows(&self) -> bool {
        self.job().is_none()
    }

    /// The user above, as messages call it.
    pub fn parent_description(&self) -> String {
        match &*self.parent.borrow() {
            Parent::Node { name, .. } => format!("node '{name}'"),
            Parent::Root { description } | Parent::Job { description, .. } => description.clone(),
        }
    }

    /// What is needed and shared over this edge.
    pub fn permissions(&self) -> Permissions {
        self.permissions.get()
    }

    pub(super) fn set_permissions(&self, permissions: Permissions) {
        self.permissions.set(permissions);
    }

    pub(super) fn set_node(&self, node: Rc<Node>) {
        *self.node.borrow_mut() = node;
    }

    pub(super) fn set_parent_node(&self, node: &Rc<Node>) {
        *self.parent.borrow_mut() = Parent::Node {
            name: node.name().to_owned(),
            node: Rc::downgrade(node),
        };
    }

    pub(super) fn close_gate(&self) {
        self.gates.set(self.gates.get() + 1);
    }

    pub(super) fn open_gate(&self) {
        self.gates.set(self.gates.get() - 1);
        self.changed.notify();
    }

    pub(super) async fn until_idle(&self) {
        self.changed.until(|| self.in_flight.get() == 0).await;
    }

    /// Requests over the edge that are not answered yet.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Requests that have crossed the edge so far.
    pub fn requests(&self) -> u64 {
        self.requests.get()
    }

    fn count_request(&self) -> InFlight {
        self.requests.set(self.requests.get() + 1);
        InFlight::enter(&self.in_flight)
    }

    /// Fills `payload` from `offset`.
    ///
    /// # Errors
    /// Outside the node over a root or backing edge: `EIO`; else what the driver says.
    pub async fn read(&self, offset: u64, payload: Payload) -> Result<()> {
        if payload.length() == 0 {
            return Ok(());
        }
        payload.check_fillable()?;
        let _passage = self.enter().await;
        let node = self.node();
        let length = payload.length() as u64;
        self.check_inside(&node, offset, length)?;
        let transfer = Transfer {
            kind: TransferKind::Read,
            offset,
            length,
        };
        let route = Route::follow(node, transfer);
        let result = padding::read(&route.node, &route.limits, route.offset, payload).await;
        self.note(result)
    }

    /// Writes `payload` at `offset`.
    ///
    /// # Errors
    /// Without write permission `EPERM`; outside the node `EIO`, unless the edge may resize it.
    pub async fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> Result<()> {
        if payload.length() == 0 {
            return Ok(());
        }
        let _passage = self.enter().await;
        let node = self.node();
        let length = payload.length() as u64;
        self.check_writable(&node, offset, length)?;
        let transfer = Transfer {
            kind: TransferKind::Write(flags),
            offset,
            length,
        };
        let route = Route::follow(node, transfer);
        let result = deliver_write(&route.node, &route.limits, route.offset, payload, flags).await;
        self.note(result)
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// As [`Child::write`].
    pub async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let _passage = self.enter().await;
        let node = self.node();
        self.check_writable(&node, range.start(), range.length())?;
        let result = deliver_zeroes(&node, range, flags).await;
        self.note(result)
    }

    /// A hint that the range is not needed. Bytes outside the node's alignment are left alone.
    ///
    /// # Errors
    /// As [`Child::write`]; a driver that cannot discard is no error.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        let _passage = self.enter().await;
        let node = self.node();
        self.check_writable(&node, range.start(), range.length())?;
        let result = deliver_discard(&node, range).await;
        self.note(result)
    }

    /// Makes all writes that were answered before durable.
    pub async fn flush(&self) -> Result<()> {
        let _passage = self.enter().await;
        let node = self.node();
        node.count(|statistics| statistics.flushes += 1);
        let result = node.flush().await;
        self.note(result)
    }

    /// What the first extent of the range is in the node below, that layer only.
    pub async fn block_status(&self, range: ByteRange) -> Result<Extent> {
        let _passage = self.enter().await;
        let node = self.node();
        self.check_inside(&node, range.start(), range.length())?;
        let extent = node.driver().block_status(range).await?;
        assert!(
            extent.length > 0 && extent.length <= range.length(),
            "{node:?} answers block status {extent:?} for {range}"
        );
        Ok(extent)
    }

    /// Tells the node below what its user is about to do there.
    pub fn debug_event(&self, event: DebugEvent) {
        self.node.borrow().driver().debug_event(event);
    }

    /// Sets the size of the node below in bytes.
    ///
    /// # Errors
    /// `EPERM` without resize permission; what the driver says.
    pub async fn truncate(&self, size: u64, options: TruncateOptions) -> Result<()> {
        let _passage = self.enter().await;
        let node = self.node();
        if !self.permissions().required.contains(Permission::RESIZE) {
            let message = format!("Node '{}' may not be resized", node.name());
            return Err(Error::new(ErrorKind::Permission, message));
        }
        let result = node.driver().truncate(size, options).await;
        node.bitmaps().resize(node.size());
        result
    }

    /// Waits at the gate of a root edge and counts what follows as one request, until dropped: for work
    /// of several requests below the edge that a drained section must not come between.
    pub async fn enter(&self) -> Passage<'_> {
        if self.gates.get() > 0 {
            self.changed.until(|| self.gates.get() == 0).await;
        }
        Passage {
            _count: Some(self.count_request()),
            child: self,
        }
    }

    /// Requests from outside and to a backing file end within the node; a format may read past the
    /// end of its file, which reads as zeroes.
    pub(super) fn check_inside(&self, node: &Node, offset: u64, length: u64) -> Result<()> {
        let end = offset.checked_add(length);
        let bound = if matches!(self.role, Role::File | Role::Image) {
            i64::MAX as u64
        } else {
            node.size()
        };
        match end {
            Some(end) if end <= bound => Ok(()),
            _ => Err(outside(node, offset, length, bound)),
        }
    }

    fn check_writable(&self, node: &Node, offset: u64, length: u64) -> Result<()> {
        let required = self.permissions().required;
        if !required.intersects(Permission::WRITE | Permission::WRITE_UNCHANGED) {
            let message = format!("Node '{}' is read only", node.name());
            return Err(Error::new(ErrorKind::Permission, message));
        }
        let grows = self.role != Role::Root && required.contains(Permission::RESIZE);
        let bound = if grows { i64::MAX as u64 } else { node.size() };
        match offset.checked_add(length) {
            Some(end) if end <= bound => Ok(()),
            _ => Err(outside(node, offset, length, bound)),
        }
    }

    fn note(&self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.node
                .borrow()
                .count(|statistics| statistics.failures += 1);
        }
        result
    }
}

fn outside(node: &Node, offset: u64, length: u64, bound: u64) -> Error {
    let message = format!(
        "request {offset:#x}+{length:#x} ends outside node '{}' of {bound:#x} bytes",
        node.name()
    );
    Error::from_errno(Errno::EIO, message)
}

/// A request between its admission and its answer.
pub struct Passage<'a> {
    _count: Option<InFlight>,
    child: &'a Child,
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self._count = None;
        if self.child.gates.get() > 0 && self.child.in_flight.get() == 0 {
            self.child.changed.notify();
        }
    }
}

/// The fast path: the nodes that a transfer crosses unchanged, down to the one that must work on it.
/// Edges on the way are counted like any other.
struct Route {
    node: Rc<Node>,
    /// Of that node.
    limits: Limits,
    offset: u64,
    /// A format on its file has one hop; only more than that are allocated for.
    _first: Option<Hop>,
    _others: Vec<Hop>,
}

/// What lives as long as the transfer that crosses an edge.
struct Hop {
    _recording: Option<Recording>,
    _count: InFlight,
    _guard: Option<TransferGuard>,
}

impl Route {
    fn follow(mut node: Rc<Node>, mut transfer: Transfer) -> Route {
        let (mut first, mut others) = (None, Vec::new());
        loop {
            count_transfer(&node, &transfer);
            let limits = node.driver().limits();
            let (forward, recording) = match forward(&node, &limits, &transfer) {
                Some(found) => found,
                None => {
                    return Route {
                        node,
                        limits,
                        offset: transfer.offset,
                        _first: first,
                        _others: others,
                    };
                }
            };
            let Forward {
                child,
                offset,
                guard,
            } = forward;
            transfer.offset = offset;
            let hop = Hop {
                _recording: recording,
                _count: child.count_request(),
                _guard: guard,
            };
            match first {
                None => first = Some(hop),
                Some(_) => others.push(hop),
            }
            node = child.node();
        }
    }
}

fn forward(
    node: &Rc<Node>,
    limits: &Limits,
    transfer: &Transfer,
) -> Option<(Forward, Option<Recording>)> {
    let writes = transfer.kind != TransferKind::Read;
    let looks = writes && node.options().detect_zeroes != DetectZeroes::Off;
    let fits = transfer.length <= u64::from(limits.max_transfer)
        && is_aligned(
            transfer.offset | transfer.length,
            u64::from(limits.request_alignment),
        );
    let waits = writes && !node.bitmaps().is_kept(transfer.range());
    if looks || waits || !fits {
        return None;
    }
    let forward = node.driver().forward(transfer)?;
    let recording = match writes {
        true => Recording::begin_kept(node, transfer.range()),
        false => None,
    };
    Some((forward, recording))
}

fn count_transfer(node: &Node, transfer: &Transfer) {
    node.count(|statistics| match transfer.kind {
        TransferKind::Read => {
            statistics.reads += 1;
            statistics.read_bytes += transfer.length;
        }
        TransferKind::Write(_) => {
            statistics.writes += 1;
            statistics.written_bytes += transfer.length;
            statistics.highest_written = statistics
                .highest_written
                .max(transfer.offset + transfer.length);
        }
    });
}

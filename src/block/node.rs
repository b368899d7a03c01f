//! A node: a driver with a name, its edges, and what is counted of it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::{Rc, Weak};

use crate::error::{Error, Result};

use super::drain::Condition;
use super::occupation::Occupations;
use super::{Bitmaps, Child, Driver, NodeSpec, Permissions, RangeLock, Role};

/// Bounds of the granularity of dirty bitmaps that is chosen where none is given.
const LEAST_GRANULARITY: u64 = 4 << 10;
const MOST_GRANULARITY: u64 = 64 << 10;

/// What becomes of discard requests to a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardMode {
    /// They end here, successfully.
    #[default]
    Ignore,
    /// They reach the driver.
    Unmap,
}

/// Whether writes of zeroes are turned into write-zeroes requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// No.
    #[default]
    Off,
    /// Yes; space stays allocated.
    On,
    /// Yes, and space may be given back.
    Unmap,
}

/// Options that every node has, as in QEMU's `BlockdevOptions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Nobody may write.
    pub read_only: bool,
    /// A protocol node that cannot be written falls back to read-only.
    pub auto_read_only: bool,
    /// Open although others hold locks; only with `read_only`.
    pub force_share: bool,
    /// Past the host's page cache (`cache.direct`).
    pub cache_direct: bool,
    /// Flushes are answered without a flush (`cache.no-flush`).
    pub cache_no_flush: bool,
    /// What becomes of discards.
    pub discard: DiscardMode,
    /// Whether zeroes are looked for in writes.
    pub detect_zeroes: DetectZeroes,
}

/// Requests that entered a node, since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeStatistics {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Requests that failed.
    pub failures: u64,
    /// One past the last byte ever written.
    pub highest_written: u64,
}

/// An element of the block graph.
pub struct Node {
    name: String,
    driver: Box<dyn Driver>,
    options: Cell<NodeOptions>,
    file_name: RefCell<String>,
    opened_with: RefCell<Option<Rc<dyn Any>>>,
    /// Edges to this node. Their users own them: a strong count here would close a cycle.
    parents: RefCell<Vec<Weak<Child>>>,
    pub(super) children: RefCell<Vec<Rc<Child>>>,
    pub(super) monitor_owned: Cell<bool>,
    implicit: bool,
    statistics: RefCell<NodeStatistics>,
    /// Orders padded writes (read-modify-write) with aligned ones.
    pub(super) padding: RangeLock,
    flushes: FlushGate,
    bitmaps: Rc<Bitmaps>,
    pub(super) occupations: Rc<Occupations>,
}

impl Node {
    pub(super) fn new(spec: NodeSpec, driver: Box<dyn Driver>) -> Node {
        let stored = driver.bitmap_store().map(|store| store.bitmaps().clone());
        Node {
            name: spec.name,
            bitmaps: stored.unwrap_or_default(),
            driver,
            options: Cell::new(spec.options),
            file_name: RefCell::new(spec.file_name),
            opened_with: RefCell::new(None),
            parents: RefCell::default(),
            children: RefCell::default(),
            monitor_owned: Cell::new(false),
            implicit: spec.implicit,
            statistics: RefCell::default(),
            padding: RangeLock::new(),
            flushes: FlushGate::default(),
            occupations: Rc::default(),
        }
    }

    /// The node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the node does.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The driver as its own type, for who knows it.
    pub fn driver_as<T: Driver>(&self) -> Option<&T> {
        self.driver.as_any().downcast_ref()
    }

    /// The dirty bitmaps of the node.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Bytes in the node.
    pub fn size(&self) -> u64 {
        self.driver.size()
    }

    /// Options as they are now.
    pub fn options(&self) -> NodeOptions {
        self.options.get()
    }

    /// New options; the driver has been told what concerns it. In a drained section.
    pub fn set_options(&self, options: NodeOptions) {
        self.options.set(options);
    }

    /// The file name that queries show and that an overlay's header will name.
    pub fn file_name(&self) -> String {
        self.file_name.borrow().clone()
    }

    /// Another file name, as the graph below has changed.
    pub fn set_file_name(&self, name: impl Into<String>) {
        *self.file_name.borrow_mut() = name.into();
    }

    /// What `blockdev` opened the node with; only it knows the type.
    pub fn opened_with(&self) -> Option<Rc<dyn Any>> {
        self.opened_with.borrow().clone()
    }

    /// Remembers what the node was opened with.
    pub fn set_opened_with(&self, with: Rc<dyn Any>) {
        *self.opened_with.borrow_mut() = Some(with);
    }

    /// Edges to this node, newest first.
    pub fn parents(&self) -> Vec<Rc<Child>> {
        let parents = self.parents.borrow();
        parents.iter().rev().filter_map(Weak::upgrade).collect()
    }

    /// An edge leads here from now on.
    pub(super) fn add_parent(&self, edge: &Rc<Child>) {
        self.parents.borrow_mut().push(Rc::downgrade(edge));
    }

    /// An edge leads here no more.
    pub(super) fn remove_parent(&self, edge: &Rc<Child>) {
        let gone = Rc::as_ptr(edge);
        let mut parents = self.parents.borrow_mut();
        parents.retain(|other| other.as_ptr() != gone);
    }

    /// Edges from this node.
    pub fn children(&self) -> Vec<Rc<Child>> {
        self.children.borrow().clone()
    }

    /// The edge in this role.
    pub fn child(&self, role: Role) -> Option<Rc<Child>> {
        self.children
            .borrow()
            .iter()
            .find(|child| child.role() == role)
            .cloned()
    }

    /// The next layer of the backing chain: filters on the way, and the node itself where it is one,
    /// are looked through. What the backing edge itself leads to is the child's node.
    pub fn backing(&self) -> Option<Rc<Node>> {
        let edge = match self.filtered() {
            Some(edge) => edge.node().without_filters().child(Role::Backing),
            None => self.child(Role::Backing),
        };
        edge.map(|edge| edge.node().without_filters())
    }

    /// The edge to the node whose content a filter passes on; `None` for a node that is no filter.
    pub fn filtered(&self) -> Option<Rc<Child>> {
        if !self.driver.is_filter() {
            return None;
        }
        [Role::File, Role::Image, Role::Backing]
            .iter()
            .find_map(|role| self.child(*role))
    }

    /// The edge to what the node keeps its data in: the file of a format, what a filter passes on.
    pub fn storage(&self) -> Option<Rc<Child>> {
        self.filtered().or_else(|| self.child(Role::File))
    }

    /// Bytes that one bit of a dirty bitmap stands for where nobody says: a cluster of the image that the node
    /// shows, perhaps through filters, between 4 and 64 KiB; 64 KiB where it has no clusters, as in QEMU.
    pub fn default_granularity(self: &Rc<Node>) -> u64 {
        let cluster = self.without_filters().driver().cluster_size();
        cluster.map_or(MOST_GRANULARITY, |size| {
            size.clamp(LEAST_GRANULARITY, MOST_GRANULARITY)
        })
    }

    /// The first node from here down that is no filter.
    pub fn without_filters(self: &Rc<Node>) -> Rc<Node> {
        let mut node = self.clone();
        while let Some(edge) = node.filtered() {
            node = edge.node();
        }
        node
    }

    /// The first node from here down that the user knows of: what jobs put in without a name is not.
    pub fn without_implicit_filters(self: &Rc<Node>) -> Rc<Node> {
        let mut node = self.clone();
        while let Some(edge) = node.filtered().filter(|_| node.implicit) {
            node = edge.node();
        }
        node
    }

    /// Put in by a job without a name.
    pub fn is_implicit(&self) -> bool {
        self.implicit
    }

    /// The next node down its chain: the child of a filter, the backing file of any other.
    pub fn below(&self) -> Option<Rc<Node>> {
        let edge = self.filtered().or_else(|| self.child(Role::Backing));
        edge.map(|edge| edge.node())
    }

    /// Created by `blockdev-add`, and there until `blockdev-del`.
    pub fn is_monitor_owned(&self) -> bool {
        self.monitor_owned.get()
    }

    /// Takes or gives up the monitor's reference.
    pub fn set_monitor_owned(&self, owned: bool) {
        self.monitor_owned.set(owned);
    }

    /// What all users of the node need and share together.
    pub fn users(&self) -> Permissions {
        self.parents()
            .iter()
            .fold(Permissions::NONE, |all, edge| all.and(edge.permissions()))
    }

    /// What was counted since the node was opened.
    pub fn statistics(&self) -> NodeStatistics {
        *self.statistics.borrow()
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut NodeStatistics)) {
        change(&mut self.statistics.borrow_mut());
    }

    /// Flushes; callers that come while a flush runs share the next one.
    pub(super) async fn flush(&self) -> Result<()> {
        if self.options().cache_no_flush && self.children.borrow().is_empty() {
            return Ok(());
        }
        self.flushes.flush(&*self.driver).await
    }
}

/// A name that users may give, to a node or to what uses one: a letter, then letters, digits, `-`, `.` and
/// `_`.
pub fn is_well_formed(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node '{}' ({})", self.name, self.driver.driver_name())
    }
}

/// Answers flushes that arrive together by one: each caller is answered by a flush that began after
/// it came, and a failed flush is reported to all whom it would have answered.
#[derive(Default)]
struct FlushGate {
    begun: Cell<u64>,
    ended: Cell<u64>,
    running: Cell<bool>,
    failure: RefCell<Option<(u64, Error)>>,
    turn: Condition,
}

impl FlushGate {
    async fn flush(&self, driver: &dyn Driver) -> Result<()> {
        let ticket = self.begun.get() + 1;
        while self.ended.get() < ticket {
            if self.running.get() {
                self.turn
                    .until(|| !self.running.get() || self.ended.get() >= ticket)
                    .await;
            } else {
                self.run(driver).await;
            }
        }
        match &*self.failure.borrow() {
            Some((number, error)) if *number >= ticket => Err(error.duplicate()),
            _ => Ok(()),
        }
    }

    async fn run(&self, driver: &dyn Driver) {
        let number = self.begun.get() + 1;
        self.begun.set(number);
        self.running.set(true);
        let turn = Turn(self);
        let result = driver.flush().await;
        if let Err(error) = result {
            *self.failure.borrow_mut() = Some((number, error));
        }
        self.ended.set(number);
        drop(turn);
    }
}

/// Lets the next caller flush, also where the flushing future was dropped.
struct Turn<'a>(&'a FlushGate);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.running.set(false);
        self.0.turn.notify();
    }
}

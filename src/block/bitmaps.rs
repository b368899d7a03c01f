//! The dirty bitmaps of a node, and how its changes come to them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

use super::{Bitmap, Graph, KeptRegions, Node};

/// The bitmaps of one node, in the order in which they came.
#[derive(Default)]
pub struct Bitmaps {
    list: RefCell<Vec<Rc<Bitmap>>>,
    /// While some are stored as they change.
    kept: RefCell<Option<KeptRegions>>,
    /// What is stored does not follow yet.
    unstored: Cell<bool>,
}

impl Bitmaps {
    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.list.borrow().is_empty()
    }

    /// All, oldest first.
    pub fn all(&self) -> Vec<Rc<Bitmap>> {
        self.list.borrow().clone()
    }

    /// The one of this name.
    pub fn find(&self, name: &str) -> Option<Rc<Bitmap>> {
        let list = self.list.borrow();
        list.iter().find(|bitmap| bitmap.name() == name).cloned()
    }

    /// A new one; its name is not taken.
    pub fn add(&self, bitmap: Rc<Bitmap>) {
        debug_assert!(self.find(bitmap.name()).is_none(), "{bitmap:?} twice");
        self.list.borrow_mut().push(bitmap);
    }

    /// Takes it away; who holds it may look at it still.
    pub fn remove(&self, bitmap: &Rc<Bitmap>) {
        let mut list = self.list.borrow_mut();
        list.retain(|other| !Rc::ptr_eq(other, bitmap));
    }

    /// What is stored has to follow a change, or needs not any more.
    pub fn set_unstored(&self, unstored: bool) {
        self.unstored.set(unstored);
    }

    /// What is stored has to follow; whoever asks sees to it.
    pub fn take_unstored(&self) -> bool {
        self.unstored.take()
    }

    /// The node's size is this.
    pub fn resize(&self, size: u64) {
        for bitmap in &*self.list.borrow() {
            if bitmap.size() != size {
                bitmap.resize(size);
            }
        }
        if let Some(kept) = &mut *self.kept.borrow_mut() {
            kept.resize(size);
        }
    }

    /// From now on nothing is written but to regions of so many bytes that are marked; none is. No change is
    /// in flight. Where it is so already, marks stay.
    pub fn keep(&self, size: u64, region: u64) {
        let mut kept = self.kept.borrow_mut();
        kept.get_or_insert_with(|| KeptRegions::new(size, region));
    }

    /// From now on anything may be written.
    pub fn stop_keeping(&self) {
        *self.kept.borrow_mut() = None;
    }

    /// Looks at the regions, where they are kept.
    pub fn with_kept<T>(&self, look: impl FnOnce(&KeptRegions) -> T) -> Option<T> {
        self.kept.borrow().as_ref().map(look)
    }

    /// The range may be written.
    pub fn is_kept(&self, range: ByteRange) -> bool {
        let kept = self.kept.borrow();
        kept.as_ref().is_none_or(|kept| kept.covers(range))
    }

    /// The regions of the range are marked in what is stored, durably.
    pub fn set_kept(&self, range: ByteRange) {
        if let Some(kept) = &mut *self.kept.borrow_mut() {
            kept.mark(range);
        }
    }

    /// Takes the marks of regions that no change is in flight to; answers which.
    pub fn unmark_quiet(&self) -> Vec<ByteRange> {
        let mut kept = self.kept.borrow_mut();
        kept.as_mut()
            .map(KeptRegions::unmark_quiet)
            .unwrap_or_default()
    }

    fn count(&self, range: ByteRange, change: i32) {
        if let Some(kept) = &mut *self.kept.borrow_mut() {
            kept.count(range, change);
        }
    }

    fn record(&self, range: ByteRange, size: u64) {
        self.resize(size);
        for bitmap in &*self.list.borrow() {
            bitmap.record(range);
        }
        self.count(range, -1);
    }
}

impl Graph {
    /// The bitmap of this name of the node of this name, and the node.
    ///
    /// # Errors
    /// There is no such node, or no such bitmap.
    pub fn find_bitmap(&self, node: &str, name: &str) -> Result<(Rc<Node>, Rc<Bitmap>)> {
        let Some(node) = self.find(node) else {
            let message = format!("Node '{node}' not found");
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        match node.bitmaps().find(name) {
            Some(bitmap) => Ok((node, bitmap)),
            None => {
                let message = format!("Dirty bitmap '{name}' not found");
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }
}

/// A change on its way to a node: the bitmaps know of it when this is dropped, with or without
/// success. Not before: whoever clears a bitmap and then copies must not miss what is written after.
/// That is the end of the request's future, which nobody may drop before its I/O has ended.
pub(super) struct Recording {
    node: Rc<Node>,
    range: ByteRange,
}

impl Recording {
    /// Before the change, where the node has bitmaps: the range is marked in what is stored of them.
    pub(super) async fn begin(node: &Rc<Node>, range: ByteRange) -> Result<Option<Recording>> {
        if node.bitmaps().is_empty() || range.is_empty() {
            return Ok(None);
        }
        // Counted first, so that a mark that is set stays.
        let recording = Recording::new(node, range);
        while !node.bitmaps().is_kept(range) {
            match node.driver().bitmap_store() {
                Some(store) => store.mark(range).await?,
                None => unreachable!("{node:?} keeps regions without a store"),
            }
        }
        Ok(Some(recording))
    }

    /// As [`Recording::begin`], for a range that is kept.
    pub(super) fn begin_kept(node: &Rc<Node>, range: ByteRange) -> Option<Recording> {
        debug_assert!(
            node.bitmaps().is_kept(range),
            "{node:?} is written unmarked"
        );
        (!node.bitmaps().is_empty()).then(|| Recording::new(node, range))
    }

    fn new(node: &Rc<Node>, range: ByteRange) -> Recording {
        node.bitmaps().count(range, 1);
        Recording {
            node: node.clone(),
            range,
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.node.bitmaps().record(self.range, self.node.size());
    }
}

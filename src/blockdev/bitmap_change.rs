//! Changes of dirty bitmaps by name, one by one or in a transaction.
//!
//! What is stored of persistent ones follows when all changes of a transaction have been made: first what
//! comes, then what goes, so that after a crash anywhere no bit is lost that one bitmap has got from another.
//! What a bitmap is cleared of stays in what is stored until the transaction is over.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{
    Action, Bitmap, BitmapFlags, DirtyBitmap, DrainedSection, IoFuture, Node, Stage,
};
use crate::error::Result;

use super::{Blockdev, NewBitmap};

/// A bitmap by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapName {
    /// The node it belongs to.
    pub node: String,
    /// Its name there.
    pub name: String,
}

/// What is to be done with a bitmap.
#[derive(Clone, Debug)]
pub enum BitmapChange {
    /// `block-dirty-bitmap-add`.
    Add(NewBitmap),
    /// `block-dirty-bitmap-remove`.
    Remove(BitmapName),
    /// `block-dirty-bitmap-clear`.
    Clear(BitmapName),
    /// `block-dirty-bitmap-enable` (true) and `-disable`.
    Enable(BitmapName, bool),
    /// `block-dirty-bitmap-merge`: what is dirty in one of the sources is so in the target.
    Merge {
        /// What gets the bits.
        target: BitmapName,
        /// Where they come from.
        sources: Vec<BitmapName>,
    },
}

/// A change of a bitmap, for [`Graph::transact`].
///
/// [`Graph::transact`]: crate::block::Graph::transact
pub struct BitmapAction {
    blockdev: Blockdev,
    change: BitmapChange,
    made: RefCell<Option<Made>>,
    /// What is stored may have followed.
    stored: Cell<bool>,
}

/// A change that was made, and what an undo needs.
struct Made {
    node: Rc<Node>,
    bitmap: Rc<Bitmap>,
    before: Before,
}

enum Before {
    /// It was not there.
    Nothing,
    /// It was not about to be removed.
    Staying,
    /// These were dirty.
    Bits(DirtyBitmap),
    /// It recorded, or did not.
    Recording(bool),
}

impl Blockdev {
    /// Changes a bitmap.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed.
    pub async fn change_bitmap(&self, change: BitmapChange) -> Result<()> {
        let action = self.prepare_bitmap(change);
        if action.is_stored() {
            return self.graph.transact(&[Box::new(action)]).await;
        }
        action.make_now()?;
        action.finish(true);
        Ok(())
    }

    /// A change of a bitmap as part of a transaction.
    pub fn prepare_bitmap(&self, change: BitmapChange) -> BitmapAction {
        BitmapAction {
            blockdev: self.clone(),
            change,
            made: RefCell::default(),
            stored: Cell::default(),
        }
    }
}

impl BitmapAction {
    /// What is stored has to follow at once, so that no write may be in flight that it knows nothing of.
    fn is_stored(&self) -> bool {
        let named = match &self.change {
            BitmapChange::Add(new) => return new.persistent,
            BitmapChange::Clear(_) => return false,
            BitmapChange::Remove(named) | BitmapChange::Enable(named, _) => named,
            BitmapChange::Merge { target, .. } => target,
        };
        let found = self.find(named);
        found.is_ok_and(|(_, bitmap)| bitmap.is(BitmapFlags::PERSISTENT))
    }

    fn find(&self, named: &BitmapName) -> Result<(Rc<Node>, Rc<Bitmap>)> {
        self.blockdev.graph.find_bitmap(&named.node, &named.name)
    }

    fn node_names(&self) -> Vec<&str> {
        match &self.change {
            BitmapChange::Add(new) => vec![&new.node],
            BitmapChange::Remove(named)
            | BitmapChange::Clear(named)
            | BitmapChange::Enable(named, _) => vec![&named.node],
            BitmapChange::Merge { target, sources } => {
                let all = sources.iter().chain([target]);
                all.map(|named| named.node.as_str()).collect()
            }
        }
    }

    fn make_now(&self) -> Result<()> {
        let (node, bitmap, before) = match &self.change {
            BitmapChange::Add(new) => {
                let (node, bitmap) = self.blockdev.make_bitmap(new)?;
                (node, bitmap, Before::Nothing)
            }
            BitmapChange::Remove(named) => {
                let (node, bitmap) = self.find(named)?;
                bitmap.check_not(BitmapFlags::BUSY | BitmapFlags::READ_ONLY)?;
                // It records on until it is settled.
                bitmap.set_flags(BitmapFlags::BUSY, true);
                (node, bitmap, Before::Staying)
            }
            BitmapChange::Clear(named) => {
                let (node, bitmap) = self.find(named)?;
                let before = bitmap.clear()?;
                bitmap.withhold(&before);
                (node, bitmap, Before::Bits(before))
            }
            BitmapChange::Enable(named, enable) => {
                let (node, bitmap) = self.find(named)?;
                bitmap.check_not(BitmapFlags::BUSY | BitmapFlags::INCONSISTENT)?;
                let before = bitmap.is(BitmapFlags::ENABLED);
                bitmap.set_flags(BitmapFlags::ENABLED, *enable);
                (node, bitmap, Before::Recording(before))
            }
            BitmapChange::Merge { target, sources } => {
                let (node, bitmap) = self.find(target)?;
                let sources = sources.iter().map(|named| Ok(self.find(named)?.1));
                let before = bitmap.merge(&sources.collect::<Result<Vec<_>>>()?)?;
                (node, bitmap, Before::Bits(before))
            }
        };
        if bitmap.is(BitmapFlags::PERSISTENT) && self.gains(&before) {
            node.bitmaps().set_unstored(true);
        }
        *self.made.borrow_mut() = Some(Made {
            node,
            bitmap,
            before,
        });
        Ok(())
    }

    /// What is stored lacks something until it follows. What is cleared may be stored as dirty.
    fn gains(&self, before: &Before) -> bool {
        match &self.change {
            BitmapChange::Add(_) | BitmapChange::Merge { .. } => true,
            BitmapChange::Enable(_, enable) => {
                !matches!(before, Before::Recording(recorded) if recorded == enable)
            }
            BitmapChange::Remove(_) | BitmapChange::Clear(_) => false,
        }
    }

    async fn store_stage(&self, stage: Stage) -> Result<()> {
        let found = {
            let made = self.made.borrow();
            let made = made.as_ref();
            made.map(|made| (made.node.clone(), made.bitmap.clone()))
        };
        let Some((node, bitmap)) = found else {
            unreachable!("what was not made is not stored");
        };
        match stage {
            Stage::Gains => {
                self.stored.set(true);
                if node.bitmaps().take_unstored() {
                    return store(&node).await;
                }
            }
            Stage::Losses => {
                let removes = matches!(self.change, BitmapChange::Remove(_));
                if removes && bitmap.is(BitmapFlags::PERSISTENT) {
                    bitmap.set_flags(BitmapFlags::LEAVING, true);
                    return store(&node).await;
                }
            }
            Stage::Closing => {}
        }
        Ok(())
    }

    fn undo_now(&self) {
        let mut made = self.made.borrow_mut();
        let Some(Made {
            node,
            bitmap,
            before,
        }) = &mut *made
        else {
            unreachable!("what was not made is not undone");
        };
        match before {
            Before::Nothing => node.bitmaps().remove(bitmap),
            Before::Staying => bitmap.set_flags(BitmapFlags::BUSY | BitmapFlags::LEAVING, false),
            Before::Bits(bits) => {
                bitmap.replace_bits(bits.clone());
            }
            Before::Recording(records) => bitmap.set_flags(BitmapFlags::ENABLED, *records),
        }
        if bitmap.is(BitmapFlags::PERSISTENT) {
            node.bitmaps().set_unstored(self.stored.get());
        }
    }

    fn finish(&self, made: bool) {
        let Some(Made { node, bitmap, .. }) = self.made.take() else {
            return;
        };
        bitmap.release_withheld();
        if made && matches!(self.change, BitmapChange::Remove(_)) {
            node.bitmaps().remove(&bitmap);
            bitmap.set_flags(BitmapFlags::BUSY | BitmapFlags::LEAVING, false);
        }
    }
}

/// What is stored of the node's bitmaps follows them; durable when answered. In a drained section.
async fn store(node: &Rc<Node>) -> Result<()> {
    let Some(store) = node.driver().bitmap_store() else {
        return Ok(());
    };
    let stored = store.update().await;
    if stored.is_err() {
        // Marks may be half gone: whoever writes next sets them anew.
        node.bitmaps().unmark_quiet();
    }
    stored
}

impl Action for BitmapAction {
    fn nodes(&self) -> Vec<Rc<Node>> {
        let names = self.node_names().into_iter();
        names
            .filter_map(|name| self.blockdev.graph.find(name))
            .collect()
    }

    fn make<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(async { self.make_now() })
    }

    fn store<'a>(&'a self, _drained: &'a DrainedSection, stage: Stage) -> IoFuture<'a, ()> {
        Box::pin(self.store_stage(stage))
    }

    fn undo<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(async {
            self.undo_now();
            Ok(())
        })
    }

    fn settle(&self, made: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.finish(made);
            Ok(())
        })
    }
}

//! What `blockdev` remembers of a node that it opened.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use crate::block::Node;

use super::description::Description;

/// Kept with the node ([`Node::opened_with`]).
pub(super) struct Origin {
    /// As it was described last.
    pub(super) given: RefCell<Description>,
    /// The node that it was opened for, inline or from a header, and whose options it inherits.
    pub(super) opened_for: RefCell<Weak<Node>>,
    /// File name of the backing file that opening the image by its name alone would attach.
    pub(super) automatic_backing: RefCell<Option<String>>,
}

impl Origin {
    /// Remembers how `node` was described.
    pub(super) fn remember(node: &Node, given: Description) {
        node.set_opened_with(Rc::new(Origin {
            given: RefCell::new(given),
            opened_for: RefCell::default(),
            automatic_backing: RefCell::default(),
        }));
    }

    /// What is remembered of a node; `None` for a filter that a job put in.
    pub(super) fn of(node: &Node) -> Option<Rc<Origin>> {
        node.opened_with()?.downcast().ok()
    }

    /// `child` was opened for `parent` and inherits its options.
    pub(super) fn adopt(parent: &Rc<Node>, child: &Node) {
        if let Some(origin) = Origin::of(child) {
            *origin.opened_for.borrow_mut() = Rc::downgrade(parent);
        }
    }

    /// `child` was opened for `parent`.
    pub(super) fn is_adopted(parent: &Rc<Node>, child: &Node) -> bool {
        let opened_for = Origin::of(child).and_then(|origin| origin.opened_for.borrow().upgrade());
        opened_for.is_some_and(|node| Rc::ptr_eq(&node, parent))
    }
}

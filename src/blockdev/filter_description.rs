//! Filters as somebody describes them, and opening them.

use std::rc::Rc;

use crate::block::{Child, Driver, Node};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{CopyOnRead, GuestReads};

use super::Blockdev;
use super::description::ChildDescription;
use super::value::{Reader, invalid};

/// A filter and the child whose traffic it changes.
#[derive(Clone, Debug)]
pub struct FilterDescription {
    /// The child.
    pub child: ChildDescription,
    /// Which filter.
    pub options: FilterOptions,
}

/// The filters that can be described, with their own options.
#[derive(Clone, Debug)]
pub enum FilterOptions {
    /// `copy-on-read`.
    CopyOnRead {
        /// Node-name of the lowest layer that is copied from.
        bottom: Option<String>,
    },
}

impl FilterDescription {
    /// The driver's name.
    pub fn name(&self) -> &'static str {
        match self.options {
            FilterOptions::CopyOnRead { .. } => "copy-on-read",
        }
    }

    pub(super) fn parse_copy_on_read(reader: &mut Reader) -> Result<FilterDescription> {
        let bottom = reader.string("bottom")?;
        Ok(FilterDescription {
            child: ChildDescription::parse_file(reader)?,
            options: FilterOptions::CopyOnRead { bottom },
        })
    }
}

impl Blockdev {
    /// The driver of a filter over the node that `edge` leads to.
    pub(super) fn filter(
        &self,
        options: &FilterOptions,
        edge: &Rc<Child>,
    ) -> Result<Box<dyn Driver>> {
        match options {
            FilterOptions::CopyOnRead { bottom } => {
                let bottom = match bottom {
                    Some(name) => Some(self.bottom(name, &edge.node())?),
                    None => None,
                };
                let filter = CopyOnRead::new(edge.clone(), bottom, GuestReads::Copy);
                Ok(Box::new(filter))
            }
        }
    }

    /// The lowest layer that is copied from: in the chain, and no filter.
    fn bottom(&self, name: &str, top: &Rc<Node>) -> Result<Rc<Node>> {
        let Some(bottom) = self.graph.find(name) else {
            let message = format!("Bottom node '{name}' not found");
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        if bottom.driver().is_filter() {
            return Err(invalid(format!("Bottom node '{name}' is a filter")));
        }
        let mut layer = Some(top.without_filters());
        while let Some(node) = layer {
            if Rc::ptr_eq(&node, &bottom) {
                return Ok(bottom);
            }
            layer = node.backing();
        }
        let top = top.name();
        Err(invalid(format!(
            "Bottom node '{name}' is not in the backing chain of '{top}'"
        )))
    }
}

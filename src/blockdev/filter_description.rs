//! Filters as somebody describes them, and opening them.

use std::rc::Rc;
use std::time::Duration;

use crate::block::{Child, Driver, Node, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{
    Blkdebug, CbwOptions, CopyBeforeWrite, CopyOnRead, GuestReads, OnCbwError, Preallocate,
    PreallocateOptions, SnapshotAccess, Throttle, ThrottleGroup,
};

use super::Blockdev;
use super::blkdebug_description::BlkdebugDescription;
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
    /// `blkdebug`.
    Blkdebug(Box<BlkdebugDescription>),
    /// `copy-on-read`.
    CopyOnRead {
        /// Node-name of the lowest layer that is copied from.
        bottom: Option<String>,
    },
    /// `copy-before-write`.
    CopyBeforeWrite(Box<CbwDescription>),
    /// `preallocate`.
    Preallocate(PreallocateOptions),
    /// `snapshot-access`.
    SnapshotAccess,
    /// `throttle`.
    Throttle {
        /// Id of the group.
        group: String,
    },
}

/// Options of `copy-before-write`.
#[derive(Clone, Debug)]
pub struct CbwDescription {
    /// Where it saves what a guest is about to change.
    pub target: ChildDescription,
    /// Everything else.
    pub options: CbwOptions,
}

impl FilterDescription {
    /// The driver's name.
    pub fn name(&self) -> &'static str {
        match self.options {
            FilterOptions::Blkdebug(_) => "blkdebug",
            FilterOptions::CopyOnRead { .. } => "copy-on-read",
            FilterOptions::CopyBeforeWrite(_) => "copy-before-write",
            FilterOptions::Preallocate(_) => "preallocate",
            FilterOptions::SnapshotAccess => "snapshot-access",
            FilterOptions::Throttle { .. } => "throttle",
        }
    }

    /// What its child is called.
    pub fn role(&self) -> Role {
        match self.options {
            FilterOptions::Blkdebug(_) => Role::Image,
            _ => Role::File,
        }
    }

    /// The node that it needs besides its child.
    pub fn target(&self) -> Option<&ChildDescription> {
        match &self.options {
            FilterOptions::CopyBeforeWrite(given) => Some(&given.target),
            _ => None,
        }
    }

    pub(super) fn parse_blkdebug(reader: &mut Reader) -> Result<FilterDescription> {
        let child = ChildDescription::parse_child(reader, "image")?;
        let options = BlkdebugDescription::parse(reader)?;
        Ok(FilterDescription {
            child,
            options: FilterOptions::Blkdebug(Box::new(options)),
        })
    }

    pub(super) fn parse_copy_on_read(reader: &mut Reader) -> Result<FilterDescription> {
        let bottom = reader.string("bottom")?;
        Ok(FilterDescription {
            child: ChildDescription::parse_file(reader)?,
            options: FilterOptions::CopyOnRead { bottom },
        })
    }

    pub(super) fn parse_copy_before_write(reader: &mut Reader) -> Result<FilterDescription> {
        let child = ChildDescription::parse_file(reader)?;
        let target = ChildDescription::parse_child(reader, "target")?;
        let on_error = [
            ("break-guest-write", OnCbwError::BreakGuestWrite),
            ("break-snapshot", OnCbwError::BreakSnapshot),
        ];
        let options = CbwOptions {
            on_error: reader.word("on-cbw-error", &on_error)?.unwrap_or_default(),
            timeout: reader.unsigned("cbw-timeout")?.map(Duration::from_secs),
            min_cluster_size: in_range(reader, "min-cluster-size")?.unwrap_or(0),
        };
        let given = CbwDescription { target, options };
        Ok(FilterDescription {
            child,
            options: FilterOptions::CopyBeforeWrite(Box::new(given)),
        })
    }

    pub(super) fn parse_snapshot_access(reader: &mut Reader) -> Result<FilterDescription> {
        Ok(FilterDescription {
            child: ChildDescription::parse_file(reader)?,
            options: FilterOptions::SnapshotAccess,
        })
    }

    pub(super) fn parse_preallocate(reader: &mut Reader) -> Result<FilterDescription> {
        let mut options = PreallocateOptions::default();
        if let Some(align) = in_range(reader, "prealloc-align")? {
            options.align = align;
        }
        if let Some(size) = in_range(reader, "prealloc-size")? {
            options.size = size;
        }
        Ok(FilterDescription {
            child: ChildDescription::parse_file(reader)?,
            options: FilterOptions::Preallocate(options),
        })
    }

    pub(super) fn parse_throttle(reader: &mut Reader) -> Result<FilterDescription> {
        let group = reader.required_string("throttle-group")?;
        Ok(FilterDescription {
            child: ChildDescription::parse_file(reader)?,
            options: FilterOptions::Throttle { group },
        })
    }
}

fn in_range(reader: &mut Reader, name: &str) -> Result<Option<u64>> {
    let Some(value) = reader.int(name)? else {
        return Ok(None);
    };
    let fits = u64::try_from(value).ok();
    fits.map(Some).ok_or_else(|| {
        invalid(format!(
            "Value '{value}' is out of range for parameter '{name}'"
        ))
    })
}

impl Blockdev {
    /// The driver of a filter over the node that `edge` leads to.
    pub(super) async fn filter(
        &self,
        options: &FilterOptions,
        edge: &Rc<Child>,
        target: Option<&Rc<Child>>,
    ) -> Result<Box<dyn Driver>> {
        let edge = edge.clone();
        Ok(match options {
            FilterOptions::CopyBeforeWrite(given) => {
                let Some(target) = target else {
                    unreachable!("a copy-before-write filter is opened with a target");
                };
                let (handle, options) = (&self.handle, given.options);
                options.check()?;
                Box::new(CopyBeforeWrite::new(handle, edge, target.clone(), options))
            }
            FilterOptions::SnapshotAccess => Box::new(SnapshotAccess::new(edge)),
            FilterOptions::Blkdebug(given) => {
                let options = given.options(&self.handle).await?;
                Box::new(Blkdebug::new(&self.handle, edge, options)?)
            }
            FilterOptions::CopyOnRead { bottom } => {
                let bottom = match bottom {
                    Some(name) => Some(self.bottom(name, &edge.node())?),
                    None => None,
                };
                Box::new(CopyOnRead::new(edge, bottom, GuestReads::Copy))
            }
            FilterOptions::Preallocate(options) => Box::new(Preallocate::new(edge, *options)?),
            FilterOptions::Throttle { group } => {
                Box::new(Throttle::new(edge, self.throttle_group(group)?))
            }
        })
    }

    /// # Errors
    /// There is no group of this id.
    pub(super) fn throttle_group(&self, id: &str) -> Result<Rc<ThrottleGroup>> {
        self.throttle_groups.find(id).ok_or_else(|| {
            let message = format!("Throttle group '{id}' does not exist");
            Error::new(ErrorKind::NotFound, message)
        })
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

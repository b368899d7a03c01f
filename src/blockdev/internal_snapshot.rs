//! Internal snapshots of images in use: making one, alone or in a transaction, and deleting one.
//!
//! The snapshot is made when all other changes of a transaction have been made, in the same drained section: a
//! transaction that fails, or is cut short by a crash before that, leaves none behind.

use std::cell::Cell;
use std::rc::Rc;

use crate::block::{Action, DrainedSection, IoFuture, Node, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::snapshot_table::InternalSnapshot;

use super::value::invalid;
use super::{Blockdev, names};

/// A new snapshot of a node's disk, for [`Graph::transact`].
///
/// [`Graph::transact`]: crate::block::Graph::transact
pub struct NewInternalSnapshot {
    node: Rc<Node>,
    name: String,
    date: (u32, u32),
    /// It is to be in the image, and it is.
    wanted: Cell<bool>,
    stored: Cell<bool>,
}

impl Blockdev {
    /// `blockdev-snapshot-internal-sync`: what it does before guest requests have to wait. `date`: seconds since
    /// 1970, and nanoseconds.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn prepare_internal_snapshot(
        &self,
        device: &str,
        name: &str,
        date: (u32, u32),
    ) -> Result<NewInternalSnapshot> {
        let node = self.find_snapshottable(device)?;
        if name.is_empty() {
            return Err(invalid("Name is empty"));
        }
        let new = NewInternalSnapshot {
            node,
            name: name.to_owned(),
            date,
            wanted: Cell::default(),
            stored: Cell::default(),
        };
        new.check_new()?;
        Ok(new)
    }

    /// `blockdev-snapshot-delete-internal-sync`: by id, by name, or by both. Answers what it was.
    ///
    /// # Errors
    /// In QEMU's words; the image has the snapshots that it had.
    pub async fn delete_internal_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<InternalSnapshot> {
        let node = self.find_snapshottable(device)?;
        if id.is_none() && name.is_none() {
            return Err(invalid("Name or id must be provided"));
        }
        let image = image_of(&node)?;
        let all = image.snapshots();
        let fits = |given: Option<&str>, is: &str| given.is_none_or(|given| given == is);
        let found = all
            .iter()
            .position(|snapshot| fits(id, &snapshot.id) && fits(name, &snapshot.name));
        let Some(number) = found else {
            let text = |given: Option<&str>| given.unwrap_or("null").to_owned();
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                    text(id),
                    text(name)
                ),
            ));
        };
        let drained = self.graph.drain(std::slice::from_ref(&node)).await?;
        let deleted = image.delete_snapshot(number).await;
        drop(drained);
        deleted.map_err(|error| failed("delete", &all[number].name, &node, error))?;
        Ok(all[number].clone())
    }

    /// A node that can have internal snapshots now.
    fn find_snapshottable(&self, device: &str) -> Result<Rc<Node>> {
        let node = names::find_either(&self.graph, device)?;
        node.check_root()?;
        if node.options().read_only {
            let message = format!("Device '{}' is read only", node.name());
            return Err(Error::new(ErrorKind::Permission, message));
        }
        image_of(&node)?;
        Ok(node)
    }
}

fn image_of(node: &Rc<Node>) -> Result<&Qcow2> {
    node.driver_as::<Qcow2>().ok_or_else(|| {
        let format = node.driver().driver_name();
        let name = node.name();
        let message = format!(
            "Block format '{format}' used by device '{name}' does not support internal snapshots"
        );
        Error::new(ErrorKind::Unsupported, message)
    })
}

impl NewInternalSnapshot {
    fn check_new(&self) -> Result<()> {
        let all = image_of(&self.node)?.snapshots();
        if all.iter().any(|snapshot| snapshot.name == self.name) {
            let (name, device) = (&self.name, self.node.name());
            let message =
                format!("Snapshot with name '{name}' already exists on device '{device}'");
            return Err(invalid(message));
        }
        Ok(())
    }

    async fn follow(&self) -> Result<()> {
        match (self.wanted.get(), self.stored.get()) {
            (true, false) => self.create().await,
            (false, true) => self.delete().await,
            _ => Ok(()),
        }
    }

    async fn create(&self) -> Result<()> {
        // One before this in the transaction may have the same name.
        self.check_new()?;
        let created = image_of(&self.node)?
            .create_snapshot(&self.name, self.date)
            .await;
        created.map_err(|error| failed("create", &self.name, &self.node, error))?;
        self.stored.set(true);
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        let image = image_of(&self.node)?;
        let all = image.snapshots();
        if let Some(number) = all.iter().position(|snapshot| snapshot.name == self.name) {
            let deleted = image.delete_snapshot(number).await;
            deleted.map_err(|error| failed("delete", &self.name, &self.node, error))?;
        }
        self.stored.set(false);
        Ok(())
    }
}

fn failed(what: &str, name: &str, node: &Node, error: Error) -> Error {
    let device = node.name();
    error.context(format!(
        "Failed to {what} snapshot '{name}' on device '{device}'"
    ))
}

impl Action for NewInternalSnapshot {
    fn nodes(&self) -> Vec<Rc<Node>> {
        vec![self.node.clone()]
    }

    fn make<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        self.wanted.set(true);
        Box::pin(async { Ok(()) })
    }

    fn store<'a>(&'a self, _drained: &'a DrainedSection, stage: Stage) -> IoFuture<'a, ()> {
        Box::pin(async move {
            match stage {
                Stage::Gains => self.follow().await,
                Stage::Losses | Stage::Closing => Ok(()),
            }
        })
    }

    fn undo<'a>(&'a self, _drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        self.wanted.set(false);
        Box::pin(async { Ok(()) })
    }

    fn settle(&self, _made: bool) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

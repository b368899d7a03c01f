//! New images by themselves: `blockdev-create`.

use std::rc::Rc;

use crate::block::{Child, Node, NodeOptions, NodeSpec, Role, TruncateOptions};
use crate::error::Result;
use crate::format::qcow2::create::{CreateOptions, create as create_image};
use crate::protocol::file::{Created, FileKind, create as create_file};

use super::Blockdev;
use super::description::{ChildDescription, FileDescription};
use super::effective::Source;
use super::snapshot_file::CREATOR;
use super::value::Value;

/// Of what makes an image and is gone before anybody can ask.
const NAME: &str = "#create";

impl Blockdev {
    /// A file of `size` zero bytes; what a file of this name held is lost.
    ///
    /// # Errors
    /// In QEMU's words; somebody uses the file; a file that was not there before is removed.
    pub async fn create_file(&self, filename: &str, size: u64) -> Result<()> {
        self.create_sized(filename, size).await?;
        Ok(())
    }

    /// As [`Blockdev::create_file`], for who may have to undo it.
    pub(super) async fn create_sized(&self, filename: &str, size: u64) -> Result<Created> {
        let created = create_file(&self.handle, filename).await?;
        match self.empty(&created, size).await {
            Ok(()) => Ok(created),
            Err(error) => {
                created.undo(&self.handle).await;
                Err(error)
            }
        }
    }

    async fn empty(&self, created: &Created, size: u64) -> Result<()> {
        self.check_unused(created)?;
        let file = FileDescription::named(&created.filename, FileKind::Regular);
        let options = NodeOptions::default();
        let spec = NodeSpec {
            name: NAME.to_owned(),
            options,
            file_name: created.filename.clone(),
            implicit: false,
        };
        let driver = self.file(&file, &options).await?;
        let node = self.graph.insert(spec, driver, Vec::new())?;
        let edge = self.attach_creator(&node).await?;
        let options = TruncateOptions {
            exact: true,
            zero_new: true,
        };
        let mut emptied = edge.truncate(0, options).await;
        if emptied.is_ok() {
            emptied = edge.truncate(size, options).await;
        }
        let closed = self.graph.detach(&edge).await;
        emptied.and(closed)?;
        created.sync_directory(&self.handle).await
    }

    /// Makes a node, which is referred to or described, a qcow2 image; what it held is lost.
    ///
    /// # Errors
    /// In QEMU's words; the node is in use.
    pub async fn create_qcow2(&self, file: Value, options: &CreateOptions) -> Result<()> {
        options.check()?;
        let child = ChildDescription::parse(file, "file")?;
        let node = self.open_child(child, Source::Defaults).await?;
        // QEMU opens the image twice to create it; names of later nodes count on that.
        self.graph.generate_name(self.handle.random_u64());
        self.graph.generate_name(self.handle.random_u64());
        let edge = self.attach_creator(&node).await?;
        let written = create_image(&edge, options).await;
        let closed = self.graph.detach(&edge).await;
        written.and(closed)
    }

    /// The edge over which a node is written that nobody else may write.
    async fn attach_creator(&self, node: &Rc<Node>) -> Result<Rc<Child>> {
        match self.graph.attach_for(NAME, Role::File, node, CREATOR) {
            Ok(edge) => Ok(edge),
            Err(error) => {
                self.discard_failed(node).await;
                Err(error)
            }
        }
    }
}

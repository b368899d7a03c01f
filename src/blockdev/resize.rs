//! Sizes of nodes, and the backing reference in an image's header.

use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{Node, Permission, Permissions, TruncateOptions};
use crate::error::{Error, ErrorKind, Result, strerror};

use super::chain::{chain_contains, note_automatic};
use super::value::invalid;
use super::{Blockdev, check_not_busy, file_name, names};

/// Who sets a node's size.
const RESIZER: Permissions = Permissions {
    required: Permission::RESIZE,
    shared: Permission::all(),
};

impl Blockdev {
    /// `block_resize`: sets the size of a node in bytes; new bytes read as zeroes.
    ///
    /// # Errors
    /// In QEMU's words; what the driver says.
    pub async fn resize(
        &self,
        device: Option<&str>,
        node_name: Option<&str>,
        size: i64,
    ) -> Result<()> {
        let node = names::find_device_or_node(&self.graph, device, node_name)?;
        let Ok(size) = u64::try_from(size) else {
            return Err(invalid("Parameter 'size' expects a >0 size"));
        };
        check_not_busy(&node)?;
        let drained = self.graph.drain(std::slice::from_ref(&node)).await?;
        let resized = self.resize_drained(&node, size).await;
        drop(drained);
        let released = self.graph.release(&node).await;
        resized.and(released)
    }

    async fn resize_drained(&self, node: &Rc<Node>, size: u64) -> Result<()> {
        let edge = self
            .graph
            .attach_root("an unnamed block device", node, RESIZER)?;
        let options = TruncateOptions {
            exact: false,
            zero_new: true,
        };
        let resized = edge.truncate(size, options).await;
        let left = self.leave(edge, node).await;
        resized.and(left)
    }

    /// `change-backing-file`: rewrites the backing file name in a header. The attached node stays; its
    /// driver is what the header gets as format.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn change_backing_file(
        &self,
        device: &str,
        image_node_name: &str,
        backing_file: &str,
    ) -> Result<()> {
        let root = names::find_either(&self.graph, device)?;
        root.check_root()?;
        let image = names::find_node(&self.graph, image_node_name)?;
        let Some(backing) = image.backing() else {
            return Err(invalid(
                "not allowing backing file change on an image without a backing file",
            ));
        };
        if !chain_contains(&root, &image) {
            return Err(invalid(format!(
                "'{device}' and image file are not in the same chain"
            )));
        }
        let format = backing.driver().driver_name();
        let drained = self.graph.drain(std::slice::from_ref(&image)).await?;
        let changed = self.rewrite(&image, backing_file, format).await;
        drop(drained);
        changed.map_err(|error| change_failed(backing_file, &error))?;
        note_automatic(&image);
        file_name::refresh(&image);
        Ok(())
    }

    /// A read-only image is opened for writing meanwhile.
    async fn rewrite(&self, image: &Rc<Node>, file: &str, format: &str) -> Result<()> {
        let was_read_only = image.options().read_only;
        if was_read_only {
            self.make_writable(image).await?;
        }
        let reference = Some((file, format));
        let changed = image.driver().change_backing_reference(reference).await;
        if was_read_only {
            self.make_read_only(image).await?;
        }
        changed
    }
}

fn change_failed(file: &str, error: &Error) -> Error {
    let errno = match error.kind() {
        // A name that does not fit, as QEMU tells it.
        ErrorKind::NoSpace | ErrorKind::InvalidArgument => Errno::EINVAL,
        _ => error.errno(),
    };
    let text = format!(
        "Could not change backing file to '{file}': {}",
        strerror(errno)
    );
    Error::from_errno(errno, text)
}

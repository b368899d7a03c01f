//! The image file of a new overlay, or of a copy.

use std::rc::Rc;

use crate::block::{Node, Permission, Permissions, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::create::{CreateOptions, create as create_image};
use crate::format::qcow2::header::BackingReference;
use crate::protocol::file::{Created, FileKind, create as create_file};

use super::chain::identity_of;
use super::description::{Description, DriverOptions, FileDescription, SharedOptions};
use super::effective::Source;
use super::nbd_description::NbdDescription;
use super::value::invalid;
use super::{Blockdev, file_name};

/// What creating an image in a file needs: it alone writes.
pub(super) const CREATOR: Permissions = Permissions {
    required: Permission::CONSISTENT_READ
        .union(Permission::WRITE)
        .union(Permission::RESIZE),
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};

/// A server has the exports that it has.
pub(super) const CANNOT_CREATE: &str = "Protocol driver 'nbd' does not support creating new images, so \
                                        an existing image must be selected as the target";

impl Blockdev {
    /// Creates an image of `size` bytes, which reads as zeroes or as its backing file; what the file held
    /// is lost.
    ///
    /// # Errors
    /// In QEMU's words; a file that was not there before is removed.
    pub(super) async fn create_image_file(
        &self,
        filename: &str,
        format: &str,
        size: u64,
        backing: Option<&Rc<Node>>,
    ) -> Result<Created> {
        check_format(format, backing.is_some())?;
        if NbdDescription::of_name(filename).is_some() {
            return Err(Error::new(ErrorKind::Unsupported, CANNOT_CREATE));
        }
        let backing = backing.map(|node| BackingReference {
            file: file_name::for_header(node),
            format: Some(node.driver().driver_name().to_owned()),
        });
        if backing
            .as_ref()
            .is_some_and(|backing| backing.file == filename)
        {
            return Err(invalid(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        if format == "raw" {
            return self.create_sized(filename, size).await;
        }
        let options = CreateOptions {
            backing,
            ..CreateOptions::new(size)
        };
        options.check()?;
        let created = create_file(&self.handle, filename).await?;
        match self.fill(&created, &options).await {
            Ok(()) => Ok(created),
            Err(error) => {
                created.undo(&self.handle).await;
                Err(error)
            }
        }
    }

    /// Removes what was made for a change that failed, where something was.
    pub(super) async fn undo_created(&self, created: Option<Created>) {
        if let Some(created) = created {
            created.undo(&self.handle).await;
        }
    }

    async fn fill(&self, created: &Created, options: &CreateOptions) -> Result<()> {
        self.check_unused(created)?;
        let file = FileDescription::named(&created.filename, FileKind::Regular);
        let description = Description {
            node_name: None,
            shared: SharedOptions::default(),
            driver: DriverOptions::File(file),
        };
        let node = self.open_alone(description, Source::Defaults).await?;
        // QEMU opens the image twice to create it; names of later nodes count on that.
        let image = self.graph.generate_name(self.handle.random_u64());
        self.graph.generate_name(self.handle.random_u64());
        let attached = self.graph.attach_for(&image, Role::File, &node, CREATOR);
        let edge = match attached {
            Ok(edge) => edge,
            Err(error) => {
                self.discard_failed(&node).await;
                return Err(error);
            }
        };
        let written = create_image(&edge, options).await;
        let closed = self.graph.detach(&edge).await;
        written.and(closed)?;
        created.sync_directory(&self.handle).await
    }

    /// Lock bytes say this too, but not for nodes with `locking=off`.
    pub(super) fn check_unused(&self, created: &Created) -> Result<()> {
        let nodes = self.graph.nodes();
        let user = nodes.iter().find(|node| {
            !node.children().is_empty() && identity_of(node) == Some(created.identity)
        });
        match user {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::InUse, "Failed to get \"write\" lock")),
        }
    }
}

fn check_format(format: &str, has_backing: bool) -> Result<()> {
    let text = match format {
        "qcow2" => return Ok(()),
        "raw" if !has_backing => return Ok(()),
        "raw" | "file" | "host_device" | "null-co" | "null-aio" => {
            format!("Backing file not supported for file format '{format}'")
        }
        _ => format!("Unknown file format '{format}'"),
    };
    Err(Error::new(ErrorKind::Unsupported, text))
}

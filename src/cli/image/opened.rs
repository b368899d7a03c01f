//! An image's file, opened as a node of a graph of its own.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::rc::Rc;

use crate::block::{Child, Graph, NodeOptions, NodeSpec, Permission, Permissions, Role};
use crate::buffer::MemorySlice;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::header::{Header, V2_LENGTH};
use crate::protocol::file::{File, FileKind, FileOptions};
use crate::runtime::Handle;

/// What is done with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Read what nobody writes.
    Read,
    /// Read what others may write at the same time.
    ReadShared,
    /// Make an image of it.
    Write,
}

impl Access {
    /// To look at an image, although it is being written where that is asked for.
    pub(super) fn to_read(force_share: bool) -> Access {
        match force_share {
            true => Access::ReadShared,
            false => Access::Read,
        }
    }
}

/// The file. [`Opened::close`] tells of writes that were lost.
pub(super) struct Opened {
    graph: Graph,
    edge: Rc<Child>,
}

impl Opened {
    /// Opens what is there.
    ///
    /// # Errors
    /// It cannot be opened, or others use it in a way that excludes this.
    pub(super) async fn open(handle: &Handle, path: &Path, access: Access) -> Result<Opened> {
        let filename = text_of(path)?;
        let is_device = fs::metadata(path).is_ok_and(|data| {
            data.file_type().is_block_device() || data.file_type().is_char_device()
        });
        let writable = access == Access::Write;
        let options = FileOptions {
            filename: filename.to_string(),
            kind: match is_device {
                true => FileKind::Device,
                false => FileKind::Regular,
            },
            writable,
            auto_read_only: false,
            direct: false,
            no_flush: false,
            locking: access != Access::ReadShared,
        };
        let driver = File::open(handle, options).await?;
        let graph = Graph::new();
        let spec = NodeSpec {
            name: filename.to_string(),
            options: NodeOptions {
                read_only: !writable,
                ..NodeOptions::default()
            },
            file_name: filename.to_string(),
            implicit: false,
        };
        let node = graph.insert(spec, Box::new(driver), Vec::new())?;
        // As a format's file: the edge of a user of the graph could not grow it.
        let edge = graph.attach_for("image", Role::File, &node, permissions(access))?;
        Ok(Opened { graph, edge })
    }

    /// The edge for reading and writing.
    pub(super) fn edge(&self) -> &Rc<Child> {
        &self.edge
    }

    /// Bytes of the file, up to a whole sector.
    pub(super) fn size(&self) -> u64 {
        self.edge.node().size()
    }

    /// Bytes that it takes up in its file system.
    pub(super) fn allocated(&self) -> Result<u64> {
        match self.edge.node().driver_as::<File>() {
            Some(file) => file.allocated_bytes(),
            None => unreachable!("the node was made with a file"),
        }
    }

    /// Driver of the file: `file` or `host_device`.
    pub(super) fn driver_name(&self) -> &'static str {
        self.edge.node().driver().driver_name()
    }

    /// The qcow2 header.
    ///
    /// # Errors
    /// It is no qcow2 image, or one with features that are not supported.
    pub(super) async fn header(&self) -> Result<Header> {
        let start = self.read(V2_LENGTH as u64).await?;
        let cluster = Header::cluster_size(&start)?;
        Header::parse(&self.read(cluster.min(self.size())).await?)
    }

    async fn read(&self, length: u64) -> Result<Vec<u8>> {
        let bytes = MemorySlice::zeroed(length as usize);
        self.edge.read(0, bytes.clone().into()).await?;
        Ok(bytes.to_vec())
    }

    pub(super) async fn close(self) -> Result<()> {
        self.graph.detach(&self.edge).await
    }
}

fn permissions(access: Access) -> Permissions {
    let read = Permission::CONSISTENT_READ;
    match access {
        Access::Read => Permissions {
            required: read,
            shared: read | Permission::WRITE_UNCHANGED,
        },
        Access::ReadShared => Permissions {
            required: Permission::empty(),
            shared: Permission::all(),
        },
        Access::Write => Permissions {
            required: read | Permission::WRITE | Permission::RESIZE,
            shared: Permission::empty(),
        },
    }
}

/// The path as nodes carry it.
///
/// # Errors
/// It is not UTF-8.
pub(super) fn text_of(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let text = format!(
            "'{}': names that are not UTF-8 are not supported",
            path.display()
        );
        Error::new(ErrorKind::InvalidArgument, text)
    })
}

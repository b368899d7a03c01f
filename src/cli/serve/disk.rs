//! One image that is served: its node, its export, and where it is seen.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf, absolute};

use serde_json::{Value, json};

use crate::daemon::command_line::Item;
use crate::error::{Error, ErrorKind, Result};

use super::super::args::ServeArguments;
use super::super::format::Format;
use super::super::names::node_name;

/// An image with the name that its node and its export have.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) name: String,
    file: String,
    format: Format,
    device_id: Option<u32>,
}

impl Disk {
    /// The disks that the command line names.
    ///
    /// # Errors
    /// A format that is not declared, device ids for some images only.
    pub(super) fn all(arguments: &ServeArguments) -> Result<Vec<Disk>> {
        let ids = &arguments.device_ids;
        if !ids.is_empty() && ids.len() != arguments.images.len() {
            let text = "--device-id must be given for each image or for none";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let mut disks: Vec<Disk> = Vec::new();
        for (index, image) in arguments.images.iter().enumerate() {
            let taken = |name: &str| disks.iter().any(|disk| disk.name == name);
            let disk = Disk {
                name: node_name(image, taken),
                file: absolute_text(image)?,
                format: Format::of(image, arguments.format)?,
                device_id: ids.get(index).copied(),
            };
            disks.push(disk);
        }
        Ok(disks)
    }

    /// Opens the image, and with it its backing chain.
    pub(super) fn blockdev(&self, arguments: &ServeArguments) -> Item {
        let is_block_device =
            fs::metadata(&self.file).is_ok_and(|data| data.file_type().is_block_device());
        let driver = match is_block_device {
            true => "host_device",
            false => "file",
        };
        let options = json!({
            "driver": self.format.name(),
            "node-name": self.name,
            "read-only": arguments.read_only,
            "discard": "unmap",
            "cache": {"direct": arguments.direct},
            "file": {"driver": driver, "filename": self.file},
        });
        Item::Blockdev(options.to_string())
    }

    /// Shows the node.
    pub(super) fn export(&self, arguments: &ServeArguments) -> Item {
        let mut options = json!({
            "id": self.name,
            "node-name": self.name,
            "writable": !arguments.read_only,
        });
        if arguments.nbd.is_some() {
            options["type"] = "nbd".into();
            options["name"] = self.name.as_str().into();
            return Item::Export(options.to_string());
        }
        options["type"] = "ublk".into();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                options[name] = value;
            }
        };
        set("device-id", self.device_id.map(Value::from));
        set(
            "zero-copy",
            arguments.zero_copy.map(|mode| mode.name().into()),
        );
        set("queues", arguments.queues.map(Value::from));
        set("queue-depth", arguments.queue_depth.map(Value::from));
        set(
            "logical-block-size",
            arguments.logical_block_size.map(Value::from),
        );
        Item::Export(options.to_string())
    }
}

/// The path for the daemon: an overlay that is put on top later refers to it by this name from
/// wherever it is.
pub(super) fn absolute_text(path: &Path) -> Result<String> {
    let text = |path: PathBuf| path.into_os_string().into_string().ok();
    text(absolute(path)?).ok_or_else(|| {
        let text = format!(
            "'{}': names that are not UTF-8 are not supported",
            path.display()
        );
        Error::new(ErrorKind::InvalidArgument, text)
    })
}

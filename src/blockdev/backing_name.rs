//! What the backing name in an image's header leads to.
//!
//! The name is foreign data. Only plain file names are followed: no URLs, no `json:`.

use std::rc::Rc;

use crate::block::{Node, Role};
use crate::buffer::MemorySlice;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::header::BackingReference;
use crate::format::raw::RawOptions;
use crate::protocol::file::{File, FileKind};
use crate::runtime::Handle;

use super::description::{
    BackingDescription, ChildDescription, Description, DriverOptions, FileDescription,
    Qcow2Description, SharedOptions,
};
use super::value::invalid;

/// First bytes of images of other formats: offset, bytes, name.
const MAGIC: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
];

/// Bytes that [`MAGIC`] looks at.
const LOOKED_AT: usize = 512;

/// The file that a backing name means, relative to the directory of the overlay's file.
///
/// # Errors
/// The name is not a plain file name.
pub(super) fn resolve(overlay: &Node, name: &str) -> Result<String> {
    if name.contains('\0') {
        return Err(invalid("The backing file name contains a NUL character"));
    }
    if name.starts_with("json:") {
        let message = "Backing file names of the form json:{…} are not followed; name the backing \
                       file in the description of the node ('backing')";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(combine(overlay, path_of(name)?))
}

/// The path that a file name means.
///
/// # Errors
/// It is no file that it names.
pub(super) fn path_of(name: &str) -> Result<&str> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    match protocol_of(name) {
        None => Ok(name),
        Some(protocol) => {
            let message = format!("Unknown protocol '{protocol}'");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// A name relative to the directory of the overlay's file, as it is.
pub(super) fn combine(overlay: &Node, name: &str) -> String {
    if name.starts_with('/') || protocol_of(name).is_some() {
        return name.to_owned();
    }
    let file = file_below(overlay).map_or(String::new(), |node| node.file_name());
    let directory = file.rfind('/').map_or("", |slash| &file[..=slash]);
    format!("{directory}{name}")
}

/// What stands before a colon that comes before any slash.
fn protocol_of(name: &str) -> Option<&str> {
    let (protocol, _) = name.split_once(':')?;
    (!protocol.contains('/')).then_some(protocol)
}

/// The protocol node at the bottom of a node's `file` children, and of what filters pass on.
pub(super) fn file_below(node: &Node) -> Option<Rc<Node>> {
    let mut below = node.storage()?.node();
    while let Some(edge) = below.storage() {
        below = edge.node();
    }
    Some(below)
}

/// Describes the node that the reference in `overlay`'s header means.
///
/// # Errors
/// The name is not a plain file name, the format is unknown, or none is given and the content looks
/// like an image.
pub(super) async fn describe(
    handle: &Handle,
    overlay: &Node,
    reference: &BackingReference,
) -> Result<Description> {
    let filename = resolve(overlay, &reference.file)?;
    let path = filename.clone();
    let is_device = handle.blocking(move || leads_to_device(&path)).await;
    let kind = if is_device {
        FileKind::Device
    } else {
        FileKind::Regular
    };
    let file = FileDescription::named(&filename, kind);
    let inline = ChildDescription::Inline(Box::new(plain(DriverOptions::File(file.clone()))));
    let driver = match reference.format.as_deref() {
        Some("qcow2") => DriverOptions::Qcow2 {
            file: inline,
            backing: BackingDescription::FromHeader,
            options: Qcow2Description::default(),
        },
        Some("raw") | None => DriverOptions::Raw {
            file: inline,
            part: RawOptions::default(),
        },
        Some("file" | "host_device") => DriverOptions::File(file),
        Some(other) => {
            let message = format!("Unknown driver '{other}'");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    Ok(plain(driver))
}

fn plain(driver: DriverOptions) -> Description {
    Description {
        node_name: None,
        shared: SharedOptions::default(),
        driver,
    }
}

/// Whether a path leads to a block or character device.
pub(super) fn leads_to_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    let Ok(metadata) = std::fs::metadata(path) else {
        return false;
    };
    let kind = metadata.file_type();
    kind.is_block_device() || kind.is_char_device()
}

/// An undeclared backing file is raw; refuses one whose first bytes say otherwise.
///
/// # Errors
/// [`ErrorKind::InvalidImage`] naming what it looks like; what reading it says.
pub(super) async fn check_undeclared(backing: &Node) -> Result<()> {
    match looks_like(backing).await? {
        None => Ok(()),
        Some(format) => Err(Error::new(
            ErrorKind::InvalidImage,
            format!(
                "'{}' looks like a {format} image, but the overlay does not say which format its \
                 backing file has; set it with 'qemu-img rebase -u -F FORMAT -b FILE OVERLAY'",
                file_name_of(backing)
            ),
        )),
    }
}

/// The format that the first bytes of a raw image look like.
///
/// # Errors
/// What reading them says.
pub(super) async fn looks_like(raw: &Node) -> Result<Option<&'static str>> {
    let Some(edge) = raw.child(Role::File) else {
        return Ok(None);
    };
    let start = MemorySlice::zeroed(LOOKED_AT);
    edge.read(0, start.clone().into()).await?;
    let start = start.to_vec();
    let found = MAGIC
        .iter()
        .find(|(offset, magic, _)| start[*offset..].starts_with(magic));
    Ok(found.map(|(_, _, format)| *format))
}

fn file_name_of(node: &Node) -> String {
    let below = file_below(node);
    match below.as_ref().and_then(|node| node.driver_as::<File>()) {
        Some(file) => file.filename().to_owned(),
        None => node.file_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_ends_at_a_colon_before_any_slash() {
        assert_eq!(protocol_of("nbd://host/x"), Some("nbd"));
        assert_eq!(protocol_of("a.qcow2"), None);
        assert_eq!(protocol_of("./a:b"), None);
        assert_eq!(protocol_of("/dir:x/a"), None);
    }
}

//! Opening a file or device, with QEMU's texts.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_path};
use nix::sys::stat::{Mode, fstat};

use crate::block::Permissions;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Handle;

use super::access::{opens_for_writing, refusal};
use super::alignment::Alignment;
use super::descriptor::{Access, Descriptor, length, reopen};
use super::device::{self, DeviceKind};
use super::lock::ImageLock;
use super::{DiscardStatistics, File, FileKind, FileOptions};

/// Everything that opening learns on a helper thread.
struct Opened {
    file: OwnedFd,
    lock: Option<ImageLock>,
    device: DeviceKind,
    alignment: Alignment,
    length: u64,
    block_size: u32,
}

pub(super) async fn open(handle: &Handle, options: FileOptions) -> Result<File> {
    let access = Access {
        writable: opens_for_writing(Permissions::NONE, options.writable, options.auto_read_only),
        direct: options.direct,
    };
    let for_thread = options.clone();
    let opened = handle
        .blocking(move || open_blocking(&for_thread, access))
        .await?;
    let descriptor = Descriptor::new(handle, opened.file, access)?;
    Ok(File {
        handle: handle.clone(),
        filename: options.filename,
        kind: options.kind,
        device: opened.device,
        descriptor: RefCell::new(Rc::new(descriptor)),
        lock: opened.lock,
        prepared: RefCell::new(None),
        auto_read_only: Cell::new(options.auto_read_only),
        direct: Cell::new(options.direct),
        no_flush: Cell::new(options.no_flush),
        alignment: Cell::new(opened.alignment),
        block_size: opened.block_size,
        length: Cell::new(opened.length),
        changes: Cell::new(0),
        synced_changes: Cell::new(0),
        lost_writes: Cell::new(None),
        zero_range: Cell::new(true),
        clones: Cell::new(true),
        discards: Cell::new(DiscardStatistics::default()),
    })
}

/// `Could not open 'NAME': REASON`.
pub(super) fn failed(filename: &str, errno: Errno) -> Error {
    Error::sys(errno, format!("Could not open '{filename}'"))
}

fn open_blocking(options: &FileOptions, access: Access) -> Result<Opened> {
    let name = &options.filename;
    // A path descriptor first: opening a FIFO would wait for its other end.
    let path = open_path(
        name.as_str(),
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| failed(name, errno))?;
    let status = fstat(&path).map_err(|errno| failed(name, errno))?;
    let device = DeviceKind::of(&status);
    check_kind(options, device)?;
    let file =
        reopen(&path, access.flags()).map_err(|errno| open_error(name, &path, access, errno))?;
    let lock = options
        .locking
        .then(|| ImageLock::new(&path))
        .transpose()
        .map_err(|errno| failed(name, errno))?;
    let alignment = if access.direct {
        Alignment::of_direct(&file, device)
    } else {
        cached_alignment(&file, device)
    };
    let length = match device {
        DeviceKind::Character => length(&file).unwrap_or(0),
        _ => length(&file).map_err(|error| error.context(format!("Size of '{name}'")))?,
    };
    let block_size = u32::try_from(status.st_blksize)
        .ok()
        .filter(|size| size.is_power_of_two())
        .unwrap_or(4096);
    Ok(Opened {
        file,
        lock,
        device,
        alignment,
        length,
        block_size,
    })
}

/// Zeroing and discarding a block device takes whole sectors, also through the page cache.
pub(super) fn cached_alignment(file: &OwnedFd, device: DeviceKind) -> Alignment {
    let sector = match device {
        DeviceKind::Block => device::sector_size(file).unwrap_or(512),
        _ => 1,
    };
    Alignment {
        request: sector,
        ..Alignment::CACHED
    }
}

fn check_kind(options: &FileOptions, device: DeviceKind) -> Result<()> {
    let name = &options.filename;
    if device == DeviceKind::Directory {
        return Err(failed(name, Errno::EISDIR));
    }
    let is_device = matches!(device, DeviceKind::Block | DeviceKind::Character);
    let text = match options.kind {
        FileKind::Regular if device != DeviceKind::File => {
            format!("'file' driver requires '{name}' to be a regular file")
        }
        FileKind::Device if !is_device => format!(
            "'host_device' driver requires '{name}' to be either a character or block device"
        ),
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::InvalidArgument, text))
}

fn open_error(name: &str, path: &OwnedFd, access: Access, errno: Errno) -> Error {
    let cached = Access {
        direct: false,
        ..access
    };
    if errno == Errno::EINVAL && access.direct && reopen(path, cached.flags()).is_ok() {
        let text = format!("Could not open '{name}': filesystem does not support O_DIRECT");
        return Error::from_errno(errno, text);
    }
    failed(name, refusal(errno))
}

//! What kind of file it is, and the calls that only block devices have.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, fstatfs};
use nix::{request_code_none, request_code_write};

/// What kind of file a descriptor leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceKind {
    /// A regular file.
    File,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// A directory.
    Directory,
    /// A FIFO or a socket.
    Other,
}

impl DeviceKind {
    pub(super) fn of(status: &FileStat) -> DeviceKind {
        let format = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        match format {
            SFlag::S_IFREG => DeviceKind::File,
            SFlag::S_IFBLK => DeviceKind::Block,
            SFlag::S_IFCHR => DeviceKind::Character,
            SFlag::S_IFDIR => DeviceKind::Directory,
            _ => DeviceKind::Other,
        }
    }
}

nix::ioctl_write_ptr_bad!(blkdiscard, request_code_none!(0x12, 119), [u64; 2]);
nix::ioctl_read_bad!(blksszget, request_code_none!(0x12, 104), libc::c_int);

/// The kernel's `struct file_clone_range`.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    length: u64,
    offset: u64,
}

nix::ioctl_write_ptr_bad!(
    ficlonerange,
    request_code_write!(0x94, 13, size_of::<CloneRange>()),
    CloneRange
);

/// Lets a file share blocks of another: source offset, length, offset here; multiples of the file
/// system's block.
pub(super) fn clone_range(
    file: &OwnedFd,
    source: RawFd,
    [source_offset, length, offset]: [u64; 3],
) -> Result<(), Errno> {
    let range = CloneRange {
        source: i64::from(source),
        source_offset,
        length,
        offset,
    };
    // SAFETY: the descriptor is open and the kernel reads one `CloneRange` from the pointer.
    unsafe { ficlonerange(file.as_raw_fd(), &raw const range) }.map(drop)
}

/// The file lies on a server, which may copy without sending the bytes here.
pub(super) fn has_server(file: &impl AsFd) -> bool {
    const SMB2: FsType = FsType(0xfe53_4d42);
    const CIFS: FsType = FsType(0xff53_4d42);
    const CEPH: FsType = FsType(0x00c3_6400);
    let remote = [NFS_SUPER_MAGIC, FUSE_SUPER_MAGIC, SMB2, CIFS, CEPH];
    fstatfs(file).is_ok_and(|status| remote.contains(&status.filesystem_type()))
}

/// Discards `length` bytes from `start` of a block device; both multiples of its sector.
pub(super) fn discard(device: &OwnedFd, start: u64, length: u64) -> Result<(), Errno> {
    let range = [start, length];
    // SAFETY: the descriptor is open and the kernel reads two u64 from the pointer.
    unsafe { blkdiscard(device.as_raw_fd(), &raw const range) }.map(drop)
}

/// Bytes in a logical sector of a block device.
pub(super) fn sector_size(device: &impl AsFd) -> Result<u32, Errno> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open and the kernel writes one int to the pointer.
    unsafe { blksszget(device.as_fd().as_raw_fd(), &raw mut size) }?;
    u32::try_from(size).map_err(|_| Errno::EINVAL)
}

/// Alignment of direct I/O as the file system tells it (Linux 6.1): memory, then offset.
pub(super) fn direct_alignment(file: &impl AsFd) -> Option<(u32, u32)> {
    let mut status = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH names the open descriptor; the kernel fills `status`.
    let result = unsafe {
        libc::statx(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    // SAFETY: zeroed memory is a valid `statx`, and the kernel wrote over it at most.
    let status = unsafe { status.assume_init() };
    let told = result == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0;
    let (memory, offset) = (status.stx_dio_mem_align, status.stx_dio_offset_align);
    (told && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}

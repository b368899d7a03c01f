//! The daemon's own mount namespace, in which no disk of its own is mounted.
//!
//! A process that is the last member of a namespace with a mount of its own device cannot end: the
//! kernel writes the file system back on the way out, and nobody serves the writes any more.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::subprocess::Task;
use crate::error::{Error, Result};

/// Gives the process a private mount namespace without mounts of ublk disks. To be called once, before
/// the first thread is started; needs root. Mounts that others make later are not seen.
///
/// # Errors
/// What the kernel says; without the namespace, ending the daemon may hang.
pub fn isolate_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(|errno| Error::sys(errno, "Could not unshare the mount namespace"))?;
    let nothing = None::<&str>;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )
    .map_err(|errno| Error::sys(errno, "Could not make the mount namespace private"))?;
    if ublk_mounts(&read_mounts("self")?).is_empty() {
        return Ok(());
    }
    // In a child: dropping what may be a mount's last reference can wait for the disk.
    Task::DetachMounts.run()
}

/// Detaches every mount of a ublk disk in this process's namespace.
pub(super) fn detach_ublk_mounts() -> Result<()> {
    for mount in ublk_mounts(&read_mounts("self")?) {
        umount2(&mount.point, MntFlags::MNT_DETACH).map_err(|errno| {
            Error::sys(
                errno,
                format!("Could not detach '{}'", mount.point.display()),
            )
        })?;
    }
    Ok(())
}

/// Whether the disk or a part of it is mounted in the machine's first namespace, used as swap, or
/// held by another block device. (Who has merely opened it: see `openers`.)
pub(super) fn is_held(disk: &str) -> bool {
    let mounted = read_mounts("1")
        .map(|text| ublk_mounts(&text))
        .unwrap_or_default()
        .iter()
        .any(|mount| belongs_to(&mount.disk, disk));
    mounted || is_swap(disk) || has_holders(disk)
}

fn is_swap(disk: &str) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("/dev/"))
        .any(|name| belongs_to(name, disk))
}

fn has_holders(disk: &str) -> bool {
    let holders = |directory: &Path| {
        fs::read_dir(directory.join("holders")).is_ok_and(|mut entries| entries.next().is_some())
    };
    let device = Path::new("/sys/block").join(disk);
    let parts = fs::read_dir(&device).into_iter().flatten().flatten();
    holders(&device) || parts.map(|part| part.path()).any(|part| holders(&part))
}

/// `name` is the disk or one of its partitions (`ublkb1p2`).
pub(super) fn belongs_to(name: &str, disk: &str) -> bool {
    name.strip_prefix(disk)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
}

/// A mount of a ublk disk.
struct UblkMount {
    point: PathBuf,
    disk: String,
}

fn read_mounts(process: &str) -> Result<String> {
    let path = format!("/proc/{process}/mountinfo");
    fs::read_to_string(&path)
        .map_err(|error| Error::from(error).context(format!("Could not read '{path}'")))
}

fn ublk_mounts(mountinfo: &str) -> Vec<UblkMount> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let (device, point) = (fields.next()?, fields.nth(1)?);
            let disk = ublk_disk(device)?;
            let point = PathBuf::from(unescape(point));
            Some(UblkMount { point, disk })
        })
        .collect()
}

/// The name of the ublk disk or partition of that `MAJOR:MINOR`.
fn ublk_disk(device: &str) -> Option<String> {
    let target = fs::read_link(Path::new("/sys/dev/block").join(device)).ok()?;
    let name = target.file_name()?.to_str()?;
    name.starts_with("ublkb").then(|| name.to_owned())
}

/// mountinfo writes blanks and backslashes as three octal digits.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), "/mnt/a b\\c");
        assert_eq!(unescape("/mnt/\\9"), "/mnt/\\9");
    }

    #[test]
    fn partitions_belong_to_their_disk() {
        assert!(belongs_to("ublkb1", "ublkb1"));
        assert!(belongs_to("ublkb1p2", "ublkb1"));
        assert!(!belongs_to("ublkb12", "ublkb1"));
    }

    #[test]
    fn mounts_without_a_ublk_disk_are_left_alone() {
        let line = "36 35 0:25 / /mnt/x rw,noatime shared:1 - tmpfs tmpfs rw";
        assert!(ublk_mounts(line).is_empty());
        assert!(ublk_mounts("malformed").is_empty());
    }
}

//! Processes that have a disk open.
//!
//! The kernel counts a disk's openers but tells nobody the number: an exclusive open fails only for
//! who claimed the disk (a mount, another block device), and `TRY_STOP_DEV` of Linux 7.0 answers by
//! stopping. So the open files of all processes are looked through, as fuser does it.

use std::fs;
use std::path::Path;

use super::mounts::belongs_to;

/// Whether another process of this machine (that is visible from here) has the disk or a part of it
/// open.
pub(super) fn has_openers(disk: &str) -> bool {
    let own = std::process::id().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| is_process(&process.file_name().to_string_lossy(), &own))
        .any(|process| opens(&process.path(), disk))
}

fn is_process(name: &str, own: &str) -> bool {
    name != own && name.bytes().all(|byte| byte.is_ascii_digit())
}

/// The links are read, not followed: that waits for nothing.
fn opens(process: &Path, disk: &str) -> bool {
    let files = fs::read_dir(process.join("fd"));
    files.into_iter().flatten().flatten().any(|file| {
        let target = fs::read_link(file.path());
        target.is_ok_and(|target| is_disk(&target, disk))
    })
}

fn is_disk(target: &Path, disk: &str) -> bool {
    let name = target.strip_prefix("/dev").ok().and_then(Path::to_str);
    name.is_some_and(|name| belongs_to(name, disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_and_its_parts_are_recognised() {
        assert!(is_disk(Path::new("/dev/ublkb4"), "ublkb4"));
        assert!(is_disk(Path::new("/dev/ublkb4p1"), "ublkb4"));
        assert!(!is_disk(Path::new("/dev/ublkb40"), "ublkb4"));
        assert!(!is_disk(Path::new("/tmp/ublkb4"), "ublkb4"));
        assert!(!is_disk(Path::new("/dev/ublkc4"), "ublkb4"));
    }

    #[test]
    fn another_process_is_found_by_what_it_has_open() {
        let zero = fs::File::open("/dev/zero").expect("there is one");
        let sleeper = std::process::Command::new("sleep")
            .arg("60")
            .stdin(zero)
            .spawn();
        let mut sleeper = sleeper.expect("a process");
        let process = Path::new("/proc").join(sleeper.id().to_string());
        let found = opens(&process, "zero");
        sleeper.kill().expect("it sleeps");
        sleeper.wait().expect("it was killed");
        assert!(found);
        assert!(!is_process(
            &std::process::id().to_string(),
            &std::process::id().to_string()
        ));
        assert!(!is_process("self", "1"));
    }
}

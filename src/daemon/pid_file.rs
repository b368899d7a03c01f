//! The file with the daemon's process id: locked while the daemon lives, removed at its end.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::strerror;

/// The file, held open and locked.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    _lock: Flock<File>,
}

impl PidFile {
    /// Writes the file.
    ///
    /// # Errors
    /// It cannot be created or written, or a living daemon has it.
    pub(super) fn create(path: &str) -> Result<PidFile, String> {
        let failed = |what: &str, errno: nix::errno::Errno| {
            let reason = strerror(errno);
            format!("cannot create PID file: Could not {what} '{path}': {reason}")
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| failed("create", errno_of(&error)))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| failed("lock", errno))?;
        let mut file: &File = &lock;
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|error| failed("write", errno_of(&error)))?;
        let path = Path::new(path);
        Ok(PidFile {
            // The working directory may change before the file is removed.
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            _lock: lock,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "PID file could not be removed");
        }
    }
}

fn errno_of(error: &std::io::Error) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_has_the_file_and_takes_it_along() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("p.pid");
        let path = path.to_str().expect("path is UTF-8");
        let file = PidFile::create(path).expect("first daemon");
        let text = std::fs::read_to_string(path).expect("file is there");
        assert_eq!(text, format!("{}\n", std::process::id()));
        let error = PidFile::create(path).expect_err("second daemon");
        assert!(error.contains("Could not lock"), "{error}");
        drop(file);
        assert!(!Path::new(path).exists());
    }

    #[test]
    fn failures_are_worded_as_qemu_words_them() {
        assert_eq!(
            PidFile::create("nodir/p.pid").expect_err("no such directory"),
            "cannot create PID file: Could not create 'nodir/p.pid': No such file or directory"
        );
    }
}

//! The files of UNIX sockets.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Takes away a socket that nobody listens at any more, where there is one. Any other file stays: it may be somebody's
/// disk, and binding to its name fails.
///
/// # Errors
/// The socket cannot be removed.
pub fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        _ => Ok(()),
    }
}

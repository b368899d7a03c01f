//! The one error type: a small kind that code acts on, a message that people read, and a source.
//!
//! Kind to errno is [`Error::errno`] (ublk and NBD answers); kind to QMP class lives in `qmp`.

use std::fmt;

use nix::errno::Errno;

/// Result with the crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What code may decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// An I/O request or system call failed with this errno.
    Io(Errno),
    /// No space left in the image file or its file system.
    NoSpace,
    /// The image is malformed or is not of the declared format.
    InvalidImage,
    /// Metadata that was trusted turned out to be wrong; the image is not written any more.
    Corrupt,
    /// A feature that this program does not have.
    Unsupported,
    /// Somebody else uses the thing in a way that excludes this use.
    InUse,
    /// A named thing does not exist.
    NotFound,
    /// Not allowed: read-only, or the kernel says so.
    Permission,
    /// The request was cancelled before it had an effect.
    Cancelled,
    /// The caller's argument is wrong.
    InvalidArgument,
}

/// An error: kind, message, source.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message that names the node, the thing, the value and the bound.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// An I/O error with this errno; `ENOSPC` and `EDQUOT` become [`ErrorKind::NoSpace`].
    pub fn from_errno(errno: Errno, message: impl Into<String>) -> Error {
        Error::new(kind_of(errno), message)
    }

    /// `message: STRERROR` for a failed system call, as QEMU words it.
    pub fn sys(errno: Errno, message: impl fmt::Display) -> Error {
        Error::from_errno(errno, format!("{message}: {}", strerror(errno)))
    }

    /// Puts `context: ` before the message, keeping the kind and the source.
    pub fn context(mut self, context: impl fmt::Display) -> Error {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// Attaches what caused this.
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        self.source = Some(source.into());
        self
    }

    /// What code decides on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What people read.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The errno with which a block request fails for this reason.
    pub fn errno(&self) -> Errno {
        match self.kind {
            ErrorKind::Io(errno) => errno,
            ErrorKind::NoSpace => Errno::ENOSPC,
            ErrorKind::InvalidImage | ErrorKind::Corrupt => Errno::EIO,
            ErrorKind::Unsupported => Errno::EOPNOTSUPP,
            ErrorKind::InUse => Errno::EBUSY,
            ErrorKind::NotFound => Errno::ENOENT,
            ErrorKind::Permission => Errno::EPERM,
            ErrorKind::Cancelled => Errno::ECANCELED,
            ErrorKind::InvalidArgument => Errno::EINVAL,
        }
    }

    /// What somebody asked for is not valid or not possible, with the reason.
    pub fn refused(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, message)
    }

    /// A second error that says the same: requests that share one failure each get one.
    pub fn duplicate(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32));
        Error::from_errno(errno, error.to_string()).with_source(error)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::from_errno(errno, strerror(errno))
    }
}

/// The C library's text for an errno, as QEMU tells it, without the number that `std` appends.
pub fn strerror(errno: Errno) -> String {
    let number = errno as i32;
    let text = std::io::Error::from_raw_os_error(number).to_string();
    match text.strip_suffix(&format!(" (os error {number})")) {
        Some(plain) => plain.to_owned(),
        None => text,
    }
}

fn kind_of(errno: Errno) -> ErrorKind {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT => ErrorKind::NoSpace,
        other => ErrorKind::Io(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_survives_context_and_conversion() {
        let error = Error::from(std::io::Error::from_raw_os_error(Errno::ENXIO as i32));
        assert_eq!(error.context("node 'a'").errno(), Errno::ENXIO);
    }

    /// The crate `nix` has words of its own, and they were told.
    #[test]
    fn texts_are_the_c_librarys() {
        assert_eq!(strerror(Errno::EIO), "Input/output error");
        assert_eq!(strerror(Errno::ENOTSUP), "Operation not supported");
    }

    #[test]
    fn quota_counts_as_no_space() {
        assert_eq!(Error::from(Errno::EDQUOT).kind(), ErrorKind::NoSpace);
        assert_eq!(Error::from(Errno::EDQUOT).errno(), Errno::ENOSPC);
    }

    #[test]
    fn system_call_errors_read_as_the_c_library_words_them() {
        let error = Error::sys(Errno::ENOENT, "Could not open 'f'");
        assert_eq!(
            error.message(),
            "Could not open 'f': No such file or directory"
        );
    }
}

//! Error values of the transmission phase.

use nix::errno::Errno;

use crate::error::Error;

/// An error value as the protocol defines it: a fixed subset of errno with fixed numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// Operation not permitted, also for writes to a read-only export.
    Perm,
    /// Input/output error.
    Io,
    /// Cannot allocate memory.
    NoMem,
    /// Invalid argument.
    Invalid,
    /// No space left on device, also for writes past the end of the export.
    NoSpace,
    /// Value too large.
    Overflow,
    /// Operation not supported.
    NotSup,
    /// The server is about to shut down.
    Shutdown,
}

impl ErrorCode {
    /// The number on the wire.
    pub fn value(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The errno that a value on the wire stands for; one that the protocol does not have counts as invalid.
    pub fn errno_of(value: u32) -> Errno {
        match value {
            1 => Errno::EPERM,
            5 => Errno::EIO,
            12 => Errno::ENOMEM,
            28 => Errno::ENOSPC,
            75 => Errno::EOVERFLOW,
            95 => Errno::EOPNOTSUPP,
            108 => Errno::ESHUTDOWN,
            _ => Errno::EINVAL,
        }
    }

    /// The protocol's value for an errno of the host. What the protocol cannot express is an I/O error.
    pub fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::EPERM | Errno::EROFS | Errno::EACCES => Self::Perm,
            Errno::ENOMEM => Self::NoMem,
            Errno::EINVAL => Self::Invalid,
            Errno::ENOSPC | Errno::EFBIG | Errno::EDQUOT => Self::NoSpace,
            Errno::EOVERFLOW => Self::Overflow,
            Errno::EOPNOTSUPP => Self::NotSup,
            Errno::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

impl From<&Error> for ErrorCode {
    fn from(error: &Error) -> Self {
        Self::from_errno(error.errno())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_errnos_map_to_what_the_protocol_allows() {
        assert_eq!(ErrorCode::from_errno(Errno::EROFS), ErrorCode::Perm);
        assert_eq!(ErrorCode::from_errno(Errno::EDQUOT), ErrorCode::NoSpace);
        assert_eq!(ErrorCode::from_errno(Errno::EOPNOTSUPP), ErrorCode::NotSup);
        assert_eq!(ErrorCode::from_errno(Errno::ETIMEDOUT), ErrorCode::Io);
    }
}

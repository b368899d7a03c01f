//! Building the ring: the best mode the kernel has, and the tables of buffers and files.

use std::io;

use io_uring::IoUring;
use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Config;

/// The kernel's bound on registered buffers of one ring.
const MOST_BUFFER_SLOTS: u32 = 16384;

/// A ring in the best mode: deferred task work (6.1), cooperative task work (5.19), plain.
pub(super) fn build(config: &Config) -> Result<IoUring> {
    let mut last = None;
    for mode in [Mode::Deferred, Mode::Cooperative, Mode::Plain] {
        match build_mode(config, mode) {
            Ok(uring) => {
                tracing::debug!(?mode, entries = config.entries, "ring built");
                return check_features(uring);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(explain(error)),
        }
    }
    Err(explain(last.unwrap_or_else(io::Error::last_os_error)))
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Deferred,
    Cooperative,
    Plain,
}

fn build_mode(config: &Config, mode: Mode) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // Completions outnumber submissions: queue commands of an export stay in flight for long.
    builder
        .setup_cqsize(config.entries.saturating_mul(4))
        .setup_clamp();
    match mode {
        Mode::Deferred => builder
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag(),
        Mode::Cooperative => builder
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_taskrun_flag(),
        Mode::Plain => &mut builder,
    };
    builder.build(config.entries)
}

/// Without these the loop below would lose completions or could not wait with a time limit.
fn check_features(uring: IoUring) -> Result<IoUring> {
    let parameters = uring.params();
    if parameters.is_feature_nodrop() && parameters.is_feature_ext_arg() {
        return Ok(uring);
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "io_uring of this kernel is too old: Linux 5.11 or later is needed",
    ))
}

fn explain(error: io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let advice = match errno {
        Errno::EPERM => "; is it disabled? set sysctl kernel.io_uring_disabled=0",
        Errno::ENOSYS => "; this kernel or its seccomp filter does not offer it",
        Errno::ENOMEM => "; raise the limit of locked memory (RLIMIT_MEMLOCK)",
        _ => "",
    };
    Error::sys(errno, "Could not set up io_uring").with_suffix(advice)
}

trait WithSuffix {
    fn with_suffix(self, suffix: &str) -> Self;
}

impl WithSuffix for Error {
    fn with_suffix(self, suffix: &str) -> Error {
        Error::new(self.kind(), format!("{}{suffix}", self.message()))
    }
}

/// Registers the sparse buffer table; the number of slots, 0 where the kernel refuses.
pub(super) fn register_buffer_table(uring: &IoUring, wanted: u32) -> u32 {
    let slots = wanted.min(MOST_BUFFER_SLOTS);
    if slots == 0 {
        return 0;
    }
    match uring.submitter().register_buffers_sparse(slots) {
        Ok(()) => slots,
        Err(error) => {
            tracing::debug!(%error, slots, "no table of registered buffers");
            0
        }
    }
}

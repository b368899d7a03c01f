//! What direct I/O on a file demands of offsets, lengths and memory.

use std::os::fd::OwnedFd;

use nix::sys::uio::pread;

use super::device::{self, DeviceKind};

/// Alignment of requests, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of offsets and lengths.
    pub(super) request: u32,
    /// Of memory addresses.
    pub(super) memory: u32,
}

impl Alignment {
    /// Through the page cache everything goes.
    pub(super) const CACHED: Alignment = Alignment {
        request: 1,
        memory: 1,
    };

    /// Asks the kernel; where it does not say, tries reads. May block.
    pub(super) fn of_direct(file: &OwnedFd, device: DeviceKind) -> Alignment {
        if let Some((memory, request)) = device::direct_alignment(file) {
            return Alignment { request, memory };
        }
        if device == DeviceKind::Block
            && let Ok(sector) = device::sector_size(file)
        {
            return Alignment {
                request: sector,
                memory: sector,
            };
        }
        let request = smallest_read(file);
        Alignment {
            request,
            memory: request.max(512),
        }
    }
}

/// The smallest length that a direct read accepts; 4096 where none is told by an error.
fn smallest_read(file: &OwnedFd) -> u32 {
    const PAGE: usize = 4096;
    let mut memory = vec![0; 2 * PAGE];
    let skip = memory.as_ptr().align_offset(PAGE);
    for size in [512, 1024, 2048] {
        // Past the end of the file the kernel may not look at the alignment, but then it is moot.
        if pread(file, &mut memory[skip..skip + size], 0).is_ok() {
            return size as u32;
        }
    }
    PAGE as u32
}

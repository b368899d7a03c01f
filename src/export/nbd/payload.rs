//! Memory for the data of requests, with room for a reply's header in front.

use crate::buffer::{BufferPool, MEMORY_ALIGNMENT, MemorySlice};

/// Room before the data: a reply's header is put there, and both are sent as one. A whole block, so that the data is
/// aligned for direct I/O.
const HEADROOM: usize = MEMORY_ALIGNMENT;

/// Sizes of data kept for reuse, in bytes, and how many of each; larger data is allocated.
const POOLED: [(usize, usize); 2] = [(16 << 10, 256), (256 << 10, 64)];

/// Memory for the data of a read or write.
pub(super) struct Payload {
    memory: MemorySlice,
    length: usize,
}

impl Payload {
    /// The data.
    pub(super) fn data(&self) -> MemorySlice {
        self.memory.slice(HEADROOM, self.length)
    }

    /// `header`, put in front of the data.
    pub(super) fn with_header(&self, header: &[u8]) -> MemorySlice {
        let start = HEADROOM - header.len();
        self.memory.copy_in(start, header);
        self.memory.slice(start, header.len() + self.length)
    }
}

/// Where payloads come from.
pub(super) struct Payloads {
    pools: [BufferPool; POOLED.len()],
}

impl Payloads {
    /// Nothing kept yet.
    pub(super) fn new() -> Self {
        Self {
            pools: POOLED.map(|(length, most)| BufferPool::new(HEADROOM + length, most)),
        }
    }

    /// Memory for `length` bytes of data. Its content is unspecified.
    pub(super) fn take(&self, length: usize) -> Payload {
        let place = POOLED.iter().position(|(most, _)| length <= *most);
        let memory = match place {
            Some(place) => self.pools[place].take(),
            None => MemorySlice::zeroed(HEADROOM + length),
        };
        Payload { memory, length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_data_are_one_message() {
        let payloads = Payloads::new();
        for length in [0, 3, 16 << 10, (16 << 10) + 1, 1 << 20] {
            let payload = payloads.take(length);
            payload.data().fill(0, length, 7);
            let message = payload.with_header(b"head").to_vec();
            assert_eq!(message[..4], *b"head");
            assert_eq!(message[4..], vec![7; length]);
            assert!(payload.data().is_aligned(MEMORY_ALIGNMENT));
        }
    }
}

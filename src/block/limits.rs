//! What a node can take in one request.

/// Limits of a node; a [`Child`](super::Child) splits, pads and bounces so that a driver sees only
/// requests within them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of data requests are multiples of this many bytes (a power of two). A driver
    /// that hands requests on to a child says 1: who pads a write must see all writes to the block.
    pub request_alignment: u32,
    /// Requests in multiples of this many bytes need no padding here or below (a power of two).
    pub logical_block_size: u32,
    /// Memory addresses of payloads are multiples of this (a power of two).
    pub memory_alignment: u32,
    /// Largest data request in bytes.
    pub max_transfer: u32,
    /// Largest write-zeroes or discard request in bytes.
    pub max_zeroes: u64,
    /// Discards below this many bytes free nothing (a power of two).
    pub discard_granularity: u32,
    /// What a request should be a multiple of to be cheap: the cluster size of a format; a power of two.
    pub optimal_transfer: u32,
    /// The driver makes a FUA write durable itself; otherwise the edge flushes after it.
    pub native_fua: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_alignment: 1,
            logical_block_size: 1,
            memory_alignment: 1,
            max_transfer: 1 << 30,
            max_zeroes: 1 << 40,
            discard_granularity: 1,
            optimal_transfer: 4096,
            native_fua: false,
        }
    }
}

impl Limits {
    /// Limits that satisfy both: for a node that hands requests on to another.
    pub fn combine(&self, other: &Limits) -> Limits {
        Limits {
            request_alignment: self.request_alignment.max(other.request_alignment),
            logical_block_size: self.logical_block_size.max(other.logical_block_size),
            memory_alignment: self.memory_alignment.max(other.memory_alignment),
            max_transfer: self.max_transfer.min(other.max_transfer),
            max_zeroes: self.max_zeroes.min(other.max_zeroes),
            discard_granularity: self.discard_granularity.max(other.discard_granularity),
            optimal_transfer: self.optimal_transfer.max(other.optimal_transfer),
            native_fua: self.native_fua && other.native_fua,
        }
    }
}

//! Extents, as `NBD_CMD_BLOCK_STATUS` describes them.

/// In `base:allocation`: not allocated, a write may fail for want of space (`NBD_STATE_HOLE`).
pub const STATE_HOLE: u32 = 1 << 0;
/// In `base:allocation`: reads as zeroes (`NBD_STATE_ZERO`).
pub const STATE_ZERO: u32 = 1 << 1;

/// In `qemu:dirty-bitmap:NAME`: was changed.
pub const STATE_DIRTY: u32 = 1 << 0;

/// Most extents in one answer; the client asks again for the rest. 2^17 of them, 8 bytes each, are a payload of 1 MiB.
pub const MAX_EXTENTS: usize = 1 << 17;

/// A stretch of the export with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not zero.
    pub length: u64,
    /// Status; its meaning belongs to the metadata context.
    pub flags: u32,
}

/// The answer of one metadata context in the making: consecutive extents from the request's offset on.
#[derive(Debug, Default)]
pub struct ExtentList {
    extents: Vec<Extent>,
    length: u64,
}

impl ExtentList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Add `length` bytes with status `flags`; joins the last extent if that has the same status.
    pub fn push(&mut self, length: u64, flags: u32) {
        assert!(length > 0, "an extent of no bytes says nothing");
        self.length += length;
        match self.extents.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ => self.extents.push(Extent { length, flags }),
        }
    }

    /// Whether no further extent fits in one answer.
    pub fn is_full(&self) -> bool {
        self.extents.len() >= MAX_EXTENTS
    }

    /// Bytes described so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The extents, no two neighbours of one status.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_status_are_joined() {
        let mut list = ExtentList::new();
        for (length, flags) in [(10, 0), (5, 0), (1, STATE_ZERO), (4, 0)] {
            list.push(length, flags);
        }
        let expected =
            [(15, 0), (1, STATE_ZERO), (4, 0)].map(|(length, flags)| Extent { length, flags });
        assert_eq!(list.extents(), expected);
        assert_eq!(list.length(), 20);
    }
}

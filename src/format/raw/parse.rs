//! Reads numbers and texts from bytes that anybody may have written.

use crate::error::Result;

use super::stored::damaged;

/// Longest text.
const LONGEST: usize = 64 << 10;

/// What is left to read.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    /// So many bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.0.split_at_checked(length) else {
            return Err(damaged("it is too short"));
        };
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?.iter().rev();
        Ok(bytes.fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        let bytes = self.take(8)?.iter().rev();
        Ok(bytes.fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Flags, of which only these may be set.
    pub(super) fn flags(&mut self, known: u8) -> Result<u8> {
        match self.u8()? {
            flags if flags & !known == 0 => Ok(flags),
            _ => Err(damaged("it has unknown flags")),
        }
    }

    /// A text with its length before it.
    pub(super) fn text(&mut self) -> Result<String> {
        let length = self.u32()? as usize;
        if length > LONGEST {
            return Err(damaged("a text is too long"));
        }
        let text = std::str::from_utf8(self.take(length)?);
        text.map(str::to_owned)
            .map_err(|_| damaged("a text is not UTF-8"))
    }

    /// # Errors
    /// Something is left.
    pub(super) fn end(&self) -> Result<()> {
        match self.0 {
            [] => Ok(()),
            _ => Err(damaged("it is too long")),
        }
    }
}

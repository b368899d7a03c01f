//! Big-endian numbers at the front of data that has not been looked at yet.

/// Data of the wrong length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WrongLength {
    /// It ends too early.
    Short,
    /// So many bytes are left over.
    Long(usize),
}

/// Data that has not been looked at yet.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], WrongLength> {
        let (field, rest) = self.0.split_at_checked(length).ok_or(WrongLength::Short)?;
        self.0 = rest;
        Ok(field)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WrongLength> {
        let (field, rest) = self.0.split_first_chunk().ok_or(WrongLength::Short)?;
        self.0 = rest;
        Ok(*field)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WrongLength> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WrongLength> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WrongLength> {
        self.take().map(u64::from_be_bytes)
    }

    pub(super) fn end(&self) -> Result<(), WrongLength> {
        match self.0.len() {
            0 => Ok(()),
            extra => Err(WrongLength::Long(extra)),
        }
    }
}

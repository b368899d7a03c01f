//! Stand-ins for the pages of a ublk request.

use std::cell::RefCell;
use std::rc::Rc;

use nix::errno::Errno;

use crate::buffer::{KernelBuffer, KernelSlice, MemorySlice, Payload};
use crate::error::{Error, Result};

/// Pages that know which way their request goes: those of a guest read can only be written to, those
/// of a guest write only be read from.
pub struct KernelPages {
    bytes: RefCell<Vec<u8>>,
    is_write: bool,
}

impl KernelPages {
    /// The pages of a guest read of so many bytes.
    pub fn of_read(length: usize) -> Rc<KernelPages> {
        let bytes = RefCell::new(vec![0x3c; length]);
        Rc::new(KernelPages {
            bytes,
            is_write: false,
        })
    }

    /// The pages of a guest write of these bytes.
    pub fn of_write(bytes: &[u8]) -> Rc<KernelPages> {
        let bytes = RefCell::new(bytes.to_vec());
        Rc::new(KernelPages {
            bytes,
            is_write: true,
        })
    }

    /// The payload of the request.
    pub fn payload(self: &Rc<KernelPages>) -> Payload {
        Payload::Kernel(KernelSlice::whole(self.clone()))
    }

    /// What the guest sees.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    fn check(&self, for_write: bool) -> Result<()> {
        match self.is_write == for_write {
            true => Ok(()),
            false => Err(Error::sys(Errno::EACCES, "pages of the other direction")),
        }
    }
}

impl KernelBuffer for KernelPages {
    fn index(&self) -> u16 {
        0
    }

    fn length(&self) -> usize {
        self.bytes.borrow().len()
    }

    fn copy_out(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.check(true)?;
        bytes.copy_in(0, &self.bytes.borrow()[offset..offset + bytes.length()]);
        Ok(())
    }

    fn copy_in(&self, offset: usize, bytes: &MemorySlice) -> Result<()> {
        self.check(false)?;
        bytes.copy_out(
            0,
            &mut self.bytes.borrow_mut()[offset..offset + bytes.length()],
        );
        Ok(())
    }
}

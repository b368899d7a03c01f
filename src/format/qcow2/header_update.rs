//! Changing the header of an open image.

use crate::block::WriteFlags;
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;

use super::Qcow2;
use super::header::{Autoclear, BackingReference, Header};
use super::layout::HostOffset;

impl Qcow2 {
    /// Replaces the header; durable when answered. At no moment the disk has neither the old nor the
    /// new one.
    ///
    /// # Errors
    /// No room in the first cluster: nothing has changed. A failed write: nobody knows which header the
    /// disk has; no other metadata is written before it has the old one again.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _turn = self.header_turn.take().await;
        let mut header = self.header.borrow().clone();
        change(&mut header);
        let image = header.serialise()?;
        if let Some((offset, name)) = &image.name {
            self.write_metadata(HostOffset(*offset), name).await?;
            self.file().flush().await?;
            header.backing_offset = *offset;
        }
        let head = Payload::from(MemorySlice::from_bytes(&image.head));
        let mut result = self.file().write(0, head, WriteFlags::empty()).await;
        if result.is_ok() {
            result = self.file().flush().await;
        }
        self.header_unsure.set(result.is_err());
        result.map_err(|error| error.context("Could not update the qcow2 header"))?;
        self.header.replace(header);
        Ok(())
    }

    /// What a first write to the image needs: autoclear bits say that whoever writes knows of something,
    /// and here no more is known than bitmaps.
    pub(super) async fn prepare_write(&self) -> Result<()> {
        if self.writable.get() {
            return Ok(());
        }
        self.check_health()?;
        if self.read_only.get() {
            let message = format!("Node '{}' is read only", self.node_name);
            return Err(crate::error::Error::new(
                crate::error::ErrorKind::Permission,
                message,
            ));
        }
        let known = Autoclear::BITMAPS | Autoclear::BITMAPS_KEPT;
        if !known.contains(self.header.borrow().autoclear) {
            self.update_header(|header| header.autoclear &= known)
                .await?;
        }
        self.writable.set(true);
        Ok(())
    }

    /// Writes another backing reference; durable when answered.
    pub(super) async fn replace_backing_reference(
        &self,
        reference: Option<(&str, &str)>,
    ) -> Result<()> {
        self.prepare_write().await?;
        let backing = reference.map(|(file, format)| BackingReference {
            file: file.to_owned(),
            format: (!format.is_empty()).then(|| format.to_owned()),
        });
        self.flush_all().await?;
        self.update_header(|header| header.backing = backing).await
    }

    /// The backing file name and format as the header has them: data, not acted on here.
    pub fn backing_reference(&self) -> Option<BackingReference> {
        self.header.borrow().backing.clone()
    }
}

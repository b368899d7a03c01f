//! What a ublk export is added with.

use super::abi::MOST_QUEUE_DEPTH;
use crate::error::{Error, ErrorKind, Result};

/// The id by which the kernel is asked for any free one.
pub(super) const ANY_ID: u32 = u32::MAX;

/// Whether requests' pages go to the images without a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Where the kernel can.
    #[default]
    Auto,
    /// Refuse to start where it cannot.
    On,
    /// Never.
    Off,
}

/// What a ublk export is added with, beside what all exports are.
#[derive(Clone, Debug)]
pub struct UblkOptions {
    /// Number of the device; `None` for any free one.
    pub device_id: Option<u32>,
    /// Hardware queues of the disk, 1 to 64; one thread serves all.
    pub queues: u16,
    /// Requests per queue at a time, 1 to 4096.
    pub queue_depth: u16,
    /// Whether to copy.
    pub zero_copy: ZeroCopy,
    /// Bytes, 512 or 4096; `None` for what the node wants.
    pub logical_block_size: Option<u32>,
}

impl Default for UblkOptions {
    fn default() -> UblkOptions {
        UblkOptions {
            device_id: None,
            queues: 1,
            queue_depth: 128,
            zero_copy: ZeroCopy::Auto,
            logical_block_size: None,
        }
    }
}

impl UblkOptions {
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        if !(1..=64).contains(&self.queues) {
            return refuse(format!(
                "Parameter 'queues' must be 1 to 64, not {}",
                self.queues
            ));
        }
        if !(1..=MOST_QUEUE_DEPTH).contains(&self.queue_depth) {
            let depth = self.queue_depth;
            return refuse(format!(
                "Parameter 'queue-depth' must be 1 to {MOST_QUEUE_DEPTH}, not {depth}"
            ));
        }
        if self.device_id == Some(ANY_ID) {
            return refuse(format!("Parameter 'device-id' must be below {ANY_ID}"));
        }
        Ok(())
    }
}

//! What the kernel is told about the disk: the truth about the node.

use libublk::sys;

use super::abi::{Basic, Discard, Dma, Parameters, SECTOR_SHIFT, Segment};
use crate::block::Limits;
use crate::error::{Error, ErrorKind, Result};

/// Requests of this many bytes and more the disk's users should make.
const MINIMAL_IO: u32 = 4096;

/// What the disk will be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Bytes in the node.
    pub(super) size: u64,
    pub(super) limits: Limits,
    pub(super) logical_block_size: u32,
    /// Bytes of one request at most, as granted.
    pub(super) max_request: u32,
    pub(super) read_only: bool,
    /// The request's pages go to the image files as they are, so that their alignment matters.
    pub(super) zero_copy: bool,
}

/// The logical block size: as asked for, or what the node's own alignment wants.
pub(super) fn logical_block_size(asked: Option<u32>, limits: &Limits) -> Result<u32> {
    match asked {
        None => Ok(limits.logical_block_size.clamp(512, 4096)),
        Some(size @ (512 | 4096)) => Ok(size),
        Some(size) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("Parameter 'logical-block-size' must be 512 or 4096, not {size}"),
        )),
    }
}

/// Whole logical blocks of the node, in sectors.
pub(super) fn sectors(size: u64, logical_block_size: u32) -> u64 {
    (size & !(u64::from(logical_block_size) - 1)) >> SECTOR_SHIFT
}

impl Geometry {
    pub(super) fn parameters(&self) -> Parameters {
        let mut types = sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_SEGMENT;
        if !self.read_only {
            types |= sys::UBLK_PARAM_TYPE_DISCARD;
        }
        if self.zero_copy {
            types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
        }
        Parameters {
            types,
            basic: self.basic(),
            discard: self.discard(),
            dma: Dma {
                alignment: self.limits.memory_alignment.clamp(512, 2048) - 1,
                padding: 0,
            },
            // No bound but that of a request, so that requests are not split for segments' sake.
            segment: Segment {
                boundary_mask: u64::from(u32::MAX),
                max_size: self.max_request.max(MINIMAL_IO),
                max_segments: u16::MAX,
                padding: 0,
            },
            ..Parameters::default()
        }
    }

    fn basic(&self) -> Basic {
        let logical = self.logical_block_size;
        let optimal = self.limits.optimal_transfer.max(logical);
        Basic {
            attributes: self.attributes(),
            logical_block_shift: logical.ilog2() as u8,
            physical_block_shift: MINIMAL_IO.max(logical).ilog2() as u8,
            io_optimal_shift: optimal.ilog2() as u8,
            io_minimal_shift: MINIMAL_IO.max(logical).ilog2() as u8,
            max_sectors: self.max_request >> SECTOR_SHIFT,
            device_sectors: sectors(self.size, logical),
            ..Basic::default()
        }
    }

    /// The metadata of an image is cached, so there is always a cache to flush. Where a driver does
    /// not make single writes durable itself, the block layer's flush after the write is as good.
    fn attributes(&self) -> u32 {
        let mut attributes = sys::UBLK_ATTR_VOLATILE_CACHE;
        if self.limits.native_fua {
            attributes |= sys::UBLK_ATTR_FUA;
        }
        if self.read_only {
            attributes |= sys::UBLK_ATTR_READ_ONLY;
        }
        attributes
    }

    fn discard(&self) -> Discard {
        if self.read_only {
            return Discard::default();
        }
        let logical = self.logical_block_size;
        // Below 2^31 bytes: results are i32, and kernels before 6.11 truncate larger zeroouts.
        let most = self.limits.max_zeroes.min(1 << 30) as u32 & !(logical - 1);
        let most = most.max(logical) >> SECTOR_SHIFT;
        Discard {
            alignment: 0,
            granularity: self.limits.discard_granularity.max(logical),
            max_discard_sectors: most,
            max_write_zeroes_sectors: most,
            max_segments: 1,
            reserved: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            size: (1 << 30) + 700,
            limits: Limits {
                optimal_transfer: 65536,
                discard_granularity: 65536,
                ..Limits::default()
            },
            logical_block_size: 512,
            max_request: 1 << 20,
            read_only: false,
            zero_copy: true,
        }
    }

    #[test]
    fn a_size_that_ends_in_a_block_is_rounded_down() {
        assert_eq!(geometry().parameters().basic.device_sectors, (1 << 21) + 1);
        assert_eq!(sectors((1 << 30) + 700, 4096), 1 << 21);
    }

    #[test]
    fn clusters_show_as_optimal_size_and_discard_granularity() {
        let parameters = geometry().parameters();
        assert_eq!(parameters.basic.io_optimal_shift, 16);
        assert_eq!(parameters.discard.granularity, 65536);
        assert_eq!(parameters.discard.max_segments, 1);
        assert_eq!(parameters.basic.attributes, sys::UBLK_ATTR_VOLATILE_CACHE);
        assert_eq!(parameters.dma.alignment, 511);
    }

    #[test]
    fn a_read_only_disk_takes_no_discards() {
        let read_only = Geometry {
            read_only: true,
            ..geometry()
        };
        let parameters = read_only.parameters();
        assert_eq!(parameters.types & sys::UBLK_PARAM_TYPE_DISCARD, 0);
        assert_ne!(parameters.basic.attributes & sys::UBLK_ATTR_READ_ONLY, 0);
    }

    #[test]
    fn block_sizes_other_than_512_and_4096_are_refused() {
        let limits = Limits::default();
        assert_eq!(logical_block_size(None, &limits).expect("default"), 512);
        let coarse = Limits {
            logical_block_size: 4096,
            ..limits
        };
        assert_eq!(logical_block_size(None, &coarse).expect("default"), 4096);
        assert_eq!(
            logical_block_size(Some(4096), &limits).expect("valid"),
            4096
        );
        assert!(logical_block_size(Some(1024), &limits).is_err());
    }
}

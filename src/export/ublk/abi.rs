//! The kernel's ABI: what `libublk::sys` has of it, and the parameter structure, which it lacks.

use libublk::sys;

pub(super) use sys::{
    ublksrv_ctrl_cmd as ControlCommand, ublksrv_ctrl_dev_info as DeviceInfo,
    ublksrv_io_desc as IoDescriptor,
};

/// Bytes that the data buffer of one request may have at most.
pub(super) const MOST_BUFFER_BYTES: u32 = sys::UBLK_IO_BUF_BITS_MASK + 1;
/// The kernel's bound on requests per queue.
pub(super) const MOST_QUEUE_DEPTH: u16 = 4096;
/// Sectors are 512 bytes, whatever the logical block size.
pub(super) const SECTOR_SHIFT: u32 = 9;

/// What a fetch says when a request is there.
pub(super) const RESULT_REQUEST: i32 = sys::UBLK_IO_RES_OK as i32;

bitflags::bitflags! {
    /// Features of a driver and flags of a device, as far as they concern this program.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Pages of a request may be registered with a ring.
        const ZERO_COPY = sys::UBLK_F_SUPPORT_ZERO_COPY as u64;
        /// The request's bytes can be read and written through the character device.
        const USER_COPY = sys::UBLK_F_USER_COPY as u64;
        /// The size can change while the device is in use.
        const UPDATE_SIZE = sys::UBLK_F_UPDATE_SIZE as u64;
        /// Pages are registered as a request is fetched.
        const AUTO_BUFFER_REGISTRATION = sys::UBLK_F_AUTO_BUF_REG as u64;
        /// A request's pages may be registered by any thread.
        const REGISTRATION_OFF_DAEMON = sys::UBLK_F_BUF_REG_OFF_DAEMON as u64;
        /// The kernel does not read the partition table by itself.
        const NO_PARTITION_SCAN = sys::UBLK_F_NO_AUTO_PART_SCAN as u64;
    }
}

/// What makes zero copy complete: pages for whole requests, bytes for what must be touched.
pub(super) const ZERO_COPY_FEATURES: Features = Features::ZERO_COPY
    .union(Features::AUTO_BUFFER_REGISTRATION)
    .union(Features::USER_COPY);

/// Device states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceState {
    /// No disk: not started, stopped, or its server died.
    Dead,
    /// Serving.
    Live,
    /// The server died, requests wait for another.
    Quiesced,
    /// The server died, requests fail until another comes.
    FailIo,
    /// A state that this program does not know.
    Unknown(u16),
}

impl DeviceState {
    pub(super) fn of(info: &DeviceInfo) -> DeviceState {
        match u32::from(info.state) {
            sys::UBLK_S_DEV_DEAD => DeviceState::Dead,
            sys::UBLK_S_DEV_LIVE => DeviceState::Live,
            sys::UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => DeviceState::FailIo,
            _ => DeviceState::Unknown(info.state),
        }
    }
}

/// `struct ublk_params` of Linux 6.15 and later; older kernels read the part that they know.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parameters {
    pub(super) length: u32,
    pub(super) types: u32,
    pub(super) basic: Basic,
    pub(super) discard: Discard,
    pub(super) devt: [u32; 4],
    pub(super) zoned: [u32; 8],
    pub(super) dma: Dma,
    pub(super) gap: u32,
    pub(super) segment: Segment,
}

/// `struct ublk_param_basic`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Basic {
    pub(super) attributes: u32,
    pub(super) logical_block_shift: u8,
    pub(super) physical_block_shift: u8,
    pub(super) io_optimal_shift: u8,
    pub(super) io_minimal_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) chunk_sectors: u32,
    pub(super) device_sectors: u64,
    pub(super) virtual_boundary_mask: u64,
}

/// `struct ublk_param_discard`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Discard {
    pub(super) alignment: u32,
    pub(super) granularity: u32,
    pub(super) max_discard_sectors: u32,
    pub(super) max_write_zeroes_sectors: u32,
    pub(super) max_segments: u16,
    pub(super) reserved: u16,
}

/// `struct ublk_param_dma_align`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Dma {
    /// A mask: the alignment less one.
    pub(super) alignment: u32,
    pub(super) padding: u32,
}

/// `struct ublk_param_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Segment {
    pub(super) boundary_mask: u64,
    pub(super) max_size: u32,
    pub(super) max_segments: u16,
    pub(super) padding: u16,
}

// The kernel's layout, with explicit padding only: no uninitialised byte reaches it.
const _: () = assert!(size_of::<Basic>() == 32);
const _: () = assert!(size_of::<Discard>() == 20);
const _: () = assert!(std::mem::offset_of!(Parameters, discard) == 40);
const _: () = assert!(std::mem::offset_of!(Parameters, devt) == 60);
const _: () = assert!(std::mem::offset_of!(Parameters, dma) == 108);
const _: () = assert!(std::mem::offset_of!(Parameters, segment) == 120);
const _: () = assert!(size_of::<Parameters>() == 136);
const _: () = assert!(size_of::<IoDescriptor>() == 24);
const _: () = assert!(size_of::<DeviceInfo>() == 64);
const _: () = assert!(size_of::<ControlCommand>() == 32);

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// Something that the parameters did not offer.
    Other(u8),
}

/// A request as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Description {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) fua: bool,
    /// Zeroes must stay allocated.
    pub(super) no_unmap: bool,
    /// The pages could not be registered by the kernel.
    pub(super) unregistered: bool,
}

impl Description {
    pub(super) fn of(descriptor: &IoDescriptor) -> Description {
        let flags = descriptor.op_flags;
        let has = |flag: u32| flags & flag != 0;
        Description {
            operation: match flags & 0xff {
                sys::UBLK_IO_OP_READ => Operation::Read,
                sys::UBLK_IO_OP_WRITE => Operation::Write,
                sys::UBLK_IO_OP_FLUSH => Operation::Flush,
                sys::UBLK_IO_OP_DISCARD => Operation::Discard,
                sys::UBLK_IO_OP_WRITE_ZEROES => Operation::WriteZeroes,
                other => Operation::Other(other as u8),
            },
            offset: descriptor.start_sector << SECTOR_SHIFT,
            length: u64::from(descriptor.nr_sectors) << SECTOR_SHIFT,
            fua: has(sys::UBLK_IO_F_FUA),
            no_unmap: has(sys::UBLK_IO_F_NOUNMAP),
            unregistered: has(sys::UBLK_IO_F_NEED_REG_BUF),
        }
    }
}

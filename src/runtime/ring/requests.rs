//! The operations: each builds its entry, names what to keep, and returns the future.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use io_uring::{opcode, squeue, types};
use nix::fcntl::FallocateFlags;
use nix::poll::PollFlags;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use super::inflight::{InFlight, Kept};
use super::op::{OnDrop, Op, OpOutput};
use super::{Ring, RingFile};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;

/// The kernel moves at most this many bytes at once; more is a short transfer.
const MOST_BYTES: usize = 0x7fff_f000;

bitflags::bitflags! {
    /// How a write is carried out.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: i32 {
        /// The data is on stable storage at completion (`RWF_DSYNC`).
        const DSYNC = libc::RWF_DSYNC;
    }
}

/// What is on stable storage after a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsyncKind {
    /// Data, and the metadata needed to find it (fdatasync).
    Data,
    /// All metadata (fsync).
    All,
}

impl Ring {
    /// Reads from `offset` into the payload; the bytes read, 0 at the end of the file. May be short.
    pub fn read_at(&self, file: &Rc<RingFile>, offset: u64, payload: Payload) -> Op<Result<usize>> {
        let (target, flags) = file.target();
        let length = payload.length().min(MOST_BYTES) as u32;
        let sqe = match &payload {
            Payload::Memory(slice) => opcode::Read::new(target, slice.as_ptr(), length)
                .offset(offset)
                .build(),
            Payload::Kernel(slice) => {
                let start = std::ptr::without_provenance_mut(slice.start());
                opcode::ReadFixed::new(target, start, length, slice.index())
                    .offset(offset)
                    .build()
            }
            Payload::File(slice) => unreachable!("{slice:?} is filled by a read"),
        };
        self.transfer(sqe.flags(flags), file, payload)
    }

    /// Writes the payload at `offset`; the bytes written. May be short.
    pub fn write_at(
        &self,
        file: &Rc<RingFile>,
        offset: u64,
        payload: Payload,
        how: WriteFlags,
    ) -> Op<Result<usize>> {
        let (target, flags) = file.target();
        let length = payload.length().min(MOST_BYTES) as u32;
        let sqe = match &payload {
            Payload::Memory(slice) => opcode::Write::new(target, slice.as_ptr(), length)
                .offset(offset)
                .rw_flags(how.bits())
                .build(),
            Payload::Kernel(slice) => {
                let start = std::ptr::without_provenance(slice.start());
                opcode::WriteFixed::new(target, start, length, slice.index())
                    .offset(offset)
                    .rw_flags(how.bits())
                    .build()
            }
            Payload::File(slice) => unreachable!("the ring is to write {slice:?}"),
        };
        self.transfer(sqe.flags(flags), file, payload)
    }

    /// Makes what was written durable. Writes still in flight are not covered.
    pub fn fsync(&self, file: &Rc<RingFile>, kind: FsyncKind) -> Op<Result<()>> {
        let (target, flags) = file.target();
        let sync = match kind {
            FsyncKind::Data => types::FsyncFlags::DATASYNC,
            FsyncKind::All => types::FsyncFlags::empty(),
        };
        let sqe = opcode::Fsync::new(target).flags(sync).build().flags(flags);
        self.on_file(sqe, file, OnDrop::RunOn)
    }

    /// fallocate(2) over `length` bytes from `offset`.
    pub fn fallocate(
        &self,
        file: &Rc<RingFile>,
        mode: FallocateFlags,
        offset: u64,
        length: u64,
    ) -> Op<Result<()>> {
        let (target, flags) = file.target();
        let sqe = opcode::Fallocate::new(target, length)
            .offset(offset)
            .mode(mode.bits())
            .build()
            .flags(flags);
        self.on_file(sqe, file, OnDrop::RunOn)
    }

    /// Accepts a connection; the descriptor is closed on exec and blocking, as the ring wants it.
    pub fn accept(&self, listener: &Rc<RingFile>) -> Op<Result<OwnedFd>> {
        let (target, flags) = listener.target();
        let nowhere = std::ptr::null_mut();
        let sqe = opcode::Accept::new(target, nowhere, std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .flags(flags);
        let entry = InFlight {
            kept: keep_file(listener),
            retry: true,
            yields_descriptor: true,
        };
        Op::start(self, sqe, entry, OnDrop::Cancel)
    }

    /// Receives what has arrived, at most the buffer's length; 0 when the peer has shut down.
    pub fn recv(&self, socket: &Rc<RingFile>, buffer: MemorySlice) -> Op<Result<usize>> {
        let (target, flags) = socket.target();
        let length = buffer.length().min(MOST_BYTES) as u32;
        let sqe = opcode::Recv::new(target, buffer.as_ptr(), length).build();
        self.on_socket(sqe.flags(flags), socket, buffer)
    }

    /// Sends from the buffer; the bytes sent. A peer that is gone is `EPIPE`, never a signal.
    pub fn send(&self, socket: &Rc<RingFile>, buffer: MemorySlice) -> Op<Result<usize>> {
        let (target, flags) = socket.target();
        let length = buffer.length().min(MOST_BYTES) as u32;
        let sqe = opcode::Send::new(target, buffer.as_ptr(), length)
            .flags(libc::MSG_NOSIGNAL)
            .build();
        self.on_socket(sqe.flags(flags), socket, buffer)
    }

    /// Connects a blocking socket.
    pub fn connect(&self, socket: &Rc<RingFile>, address: SockaddrStorage) -> Op<Result<()>> {
        let (target, flags) = socket.target();
        // The kernel reads the address when the entry is submitted, so it needs a fixed place.
        let address = Rc::new(address);
        let sqe = opcode::Connect::new(target, address.as_ptr(), address.len()).build();
        let mut kept = keep_file(socket);
        kept.argument = Some(address);
        let entry = InFlight {
            kept,
            ..InFlight::default()
        };
        Op::start(self, sqe.flags(flags), entry, OnDrop::Cancel)
    }

    /// Waits until one of `events` holds for a descriptor (eventfd, signalfd, pidfd, socket); the
    /// events that hold, as poll(2)'s `revents`.
    pub fn poll_add(&self, file: &Rc<RingFile>, events: PollFlags) -> Op<Result<usize>> {
        let (target, flags) = file.target();
        let mask = u32::from(events.bits() as u16);
        let sqe = opcode::PollAdd::new(target, mask).build().flags(flags);
        self.on_file(sqe, file, OnDrop::Cancel)
    }

    /// A file-specific command with 16 bytes of arguments and `address` in the entry's own field;
    /// never retried. The caller keeps alive what the arguments point to ([`Op::keep`]).
    pub fn uring_cmd16(
        &self,
        file: &Rc<RingFile>,
        command: u32,
        arguments: [u8; 16],
        address: u64,
    ) -> Op<i32> {
        let (target, flags) = file.target();
        let sqe = opcode::UringCmd16::new(target, command)
            .cmd(arguments)
            .addr(Some(address))
            .build()
            .flags(flags);
        let entry = InFlight {
            kept: keep_file(file),
            ..InFlight::default()
        };
        Op::start(self, sqe, entry, OnDrop::RunOn)
    }

    /// Does nothing, through the kernel.
    pub fn nop(&self) -> Op<Result<()>> {
        Op::start(
            self,
            opcode::Nop::new().build(),
            InFlight::default(),
            OnDrop::RunOn,
        )
    }

    fn transfer(
        &self,
        sqe: squeue::Entry,
        file: &Rc<RingFile>,
        payload: Payload,
    ) -> Op<Result<usize>> {
        self.with_payload(sqe, file, payload, OnDrop::RunOn)
    }

    fn on_socket(
        &self,
        sqe: squeue::Entry,
        socket: &Rc<RingFile>,
        buffer: MemorySlice,
    ) -> Op<Result<usize>> {
        self.with_payload(sqe, socket, buffer.into(), OnDrop::Cancel)
    }

    fn with_payload(
        &self,
        sqe: squeue::Entry,
        file: &Rc<RingFile>,
        payload: Payload,
        on_drop: OnDrop,
    ) -> Op<Result<usize>> {
        let mut kept = keep_file(file);
        kept.payload = Some(payload);
        let entry = InFlight {
            kept,
            retry: true,
            yields_descriptor: false,
        };
        Op::start(self, sqe, entry, on_drop)
    }

    fn on_file<T: OpOutput>(
        &self,
        sqe: squeue::Entry,
        file: &Rc<RingFile>,
        on_drop: OnDrop,
    ) -> Op<T> {
        let entry = InFlight {
            kept: keep_file(file),
            retry: true,
            yields_descriptor: false,
        };
        Op::start(self, sqe, entry, on_drop)
    }
}

fn keep_file(file: &Rc<RingFile>) -> Kept {
    Kept {
        file: Some(file.clone()),
        ..Kept::default()
    }
}

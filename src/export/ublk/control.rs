//! Control commands: a ring of its own with 128-byte entries, on a thread of its own.
//!
//! The kernel runs control commands in worker threads and some of them block for long; the I/O
//! thread, whose work they may wait for, must never wait for them.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use nix::errno::Errno;

use super::abi::{ControlCommand, DeviceInfo, Features, Parameters};
use super::features;
use crate::error::{Error, Result};
use crate::runtime::Worker;

/// Any queue: what commands that concern no queue say.
const NO_QUEUE: u16 = u16::MAX;

type Uring = IoUring<squeue::Entry128, cqueue::Entry>;

/// Control commands for the calling thread, which waits for each.
pub(super) struct ControlRing {
    uring: Uring,
    file: File,
}

impl ControlRing {
    /// Opens the driver's control device; the error says what is missing and what to do.
    pub(super) fn open() -> Result<ControlRing> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(features::CONTROL_PATH)
            .map_err(|error| features::explain_open(&error))?;
        let uring = Uring::builder()
            .build(4)
            .map_err(|error| Error::from(error).context("Could not set up an io_uring"))?;
        Ok(ControlRing { uring, file })
    }

    /// What the driver can do; `EOPNOTSUPP` or `EINVAL` before Linux 6.5.
    pub(super) fn features(&mut self) -> Result<Features> {
        let mut bits = 0_u64;
        self.transfer(sys::UBLK_U_CMD_GET_FEATURES, 0, 0, &mut bits)?;
        Ok(Features::from_bits_truncate(bits))
    }

    /// Makes a device; what was granted replaces what was asked for.
    pub(super) fn add(&mut self, info: &mut DeviceInfo) -> Result<()> {
        self.transfer(sys::UBLK_U_CMD_ADD_DEV, info.dev_id, 0, info)
    }

    /// The device of that id; `ENODEV` where there is none.
    pub(super) fn info(&mut self, id: u32) -> Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        self.transfer(sys::UBLK_U_CMD_GET_DEV_INFO, id, 0, &mut info)?;
        Ok(info)
    }

    /// Tells what the disk will be like; before the start only.
    pub(super) fn set_parameters(&mut self, id: u32, parameters: &mut Parameters) -> Result<()> {
        parameters.length = size_of::<Parameters>() as u32;
        self.transfer(sys::UBLK_U_CMD_SET_PARAMS, id, 0, parameters)
    }

    /// Shows the disk; waits until every tag of every queue is fetched by `pid`.
    pub(super) fn start(&mut self, id: u32, pid: u32) -> Result<()> {
        self.plain(sys::UBLK_U_CMD_START_DEV, id, u64::from(pid))
    }

    /// Takes the disk away; waits for requests in flight, so their server must be alive.
    pub(super) fn stop(&mut self, id: u32) -> Result<()> {
        self.plain(sys::UBLK_U_CMD_STOP_DEV, id, 0)
    }

    /// Removes the device; waits until the character device is closed.
    pub(super) fn delete(&mut self, id: u32) -> Result<()> {
        self.plain(sys::UBLK_U_CMD_DEL_DEV, id, 0)
    }

    /// Removes the device as soon as nobody uses it; returns at once. Since Linux 6.9.
    pub(super) fn delete_later(&mut self, id: u32) -> Result<()> {
        self.plain(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, 0)
    }

    /// Changes the size of a live disk.
    pub(super) fn update_size(&mut self, id: u32, sectors: u64) -> Result<()> {
        self.plain(sys::UBLK_U_CMD_UPDATE_SIZE, id, sectors)
    }

    fn plain(&mut self, operation: u32, id: u32, data: u64) -> Result<()> {
        let command = ControlCommand {
            dev_id: id,
            queue_id: NO_QUEUE,
            data: [data],
            ..ControlCommand::default()
        };
        self.execute(operation, &command)
    }

    /// A command with a plain structure that the kernel reads and may write.
    fn transfer<T>(&mut self, operation: u32, id: u32, data: u64, value: &mut T) -> Result<()> {
        let command = ControlCommand {
            dev_id: id,
            queue_id: NO_QUEUE,
            len: size_of::<T>() as u16,
            addr: std::ptr::from_mut(value).expose_provenance() as u64,
            data: [data],
            ..ControlCommand::default()
        };
        self.execute(operation, &command)
    }

    /// Returns only when the kernel has answered: until then it may use what `command` points to.
    fn execute(&mut self, operation: u32, command: &ControlCommand) -> Result<()> {
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), operation)
            .cmd(command_bytes(command))
            .build();
        // SAFETY: what the command points to lives in a caller that waits for the completion below.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        assert!(pushed.is_ok(), "one command at a time, so there is room");
        loop {
            let entered = self.uring.submit_and_wait(1);
            if let Some(completion) = self.uring.completion().next() {
                return outcome(completion.result());
            }
            match entered {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Nothing says whether the kernel has the command; its memory must not go.
                Err(error) => panic!("the control ring failed: {error}"),
            }
        }
    }
}

fn outcome(result: i32) -> Result<()> {
    if result < 0 {
        return Err(Error::from(Errno::from_raw(-result)));
    }
    Ok(())
}

fn command_bytes(command: &ControlCommand) -> [u8; 80] {
    let mut bytes = [0; 80];
    let fields: [(usize, &[u8]); 5] = [
        (0, &command.dev_id.to_ne_bytes()),
        (4, &command.queue_id.to_ne_bytes()),
        (6, &command.len.to_ne_bytes()),
        (8, &command.addr.to_ne_bytes()),
        (16, &command.data[0].to_ne_bytes()),
    ];
    for (offset, field) in fields {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    }
    bytes
}

/// Control commands for tasks: they run one after the other on a thread of their own.
pub(super) struct Control {
    ring: Arc<Mutex<ControlRing>>,
    worker: Worker,
}

impl Control {
    /// As [`ControlRing::open`].
    pub(super) async fn open() -> Result<Control> {
        let worker = Worker::new();
        let ring = worker.run(ControlRing::open).await?;
        Ok(Control {
            ring: Arc::new(Mutex::new(ring)),
            worker,
        })
    }

    /// Runs commands on the thread.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        commands: impl FnOnce(&mut ControlRing) -> T + Send + 'static,
    ) -> T {
        let ring = self.ring.clone();
        let work = move || commands(&mut ring.lock().unwrap_or_else(PoisonError::into_inner));
        self.worker.run(work).await
    }
}

//! From nothing to a disk that can be opened.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::fs::OpenOptions;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use nix::errno::Errno;

use super::abi::{
    DeviceInfo, Features, MOST_BUFFER_BYTES, Parameters, SECTOR_SHIFT, ZERO_COPY_FEATURES,
};
use super::control::Control;
use super::device::UblkExport;
use super::features;
use super::identity::{self, Identity};
use super::options::{ANY_ID, UblkOptions, ZeroCopy};
use super::parameters::{self, Geometry};
use super::queue::{self, Service, Transport};
use crate::block::{Child, Graph};
use crate::error::{Error, ErrorKind, Result};
use crate::export::ExportSpec;
use crate::runtime::Handle;
use crate::runtime::ring::BufferSlots;

/// Largest request with zero copy, in bytes.
const MOST_ZERO_COPY: u32 = 1 << 20;
/// Largest request where each tag has a buffer, in bytes.
const MOST_COPY: u32 = 512 << 10;
/// How long device nodes may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(10);
/// How long a dead device that nobody uses may take to go.
const REMOVAL_LIMIT: Duration = Duration::from_secs(3);
/// Between two looks at something that the kernel does not announce.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// `PR_SET_IO_FLUSHER` of Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// What a device is made from.
pub(super) struct Plan<'a> {
    pub(super) handle: &'a Handle,
    pub(super) graph: &'a Graph,
    pub(super) offered: Features,
    pub(super) spec: &'a ExportSpec,
    pub(super) options: &'a UblkOptions,
}

impl Plan<'_> {
    /// Makes the device and shows the disk. Nothing is left where that fails.
    pub(super) async fn carry_out(
        &self,
        control: Control,
        root: Rc<Child>,
    ) -> Result<Rc<UblkExport>> {
        let slots = self.zero_copy_slots()?;
        let limits = root.node().driver().limits();
        let logical_block_size =
            parameters::logical_block_size(self.options.logical_block_size, &limits)?;
        let sectors = check_size(&root, logical_block_size)?;
        let device = self
            .add(&control, slots.is_some(), limits.max_transfer)
            .await?;
        let granted = Features::from_bits_truncate(device.flags);
        let zero_copy = slots.is_some() && granted.contains(ZERO_COPY_FEATURES);
        let export = Rc::new(UblkExport {
            id: self.spec.id.clone(),
            root,
            handle: self.handle.clone(),
            control,
            device,
            granted,
            zero_copy,
            logical_block_size,
            life: Rc::default(),
            live: Cell::new(false),
            closing: Cell::new(false),
            sectors_told: Cell::new(sectors),
            service: RefCell::new(None),
        });
        match self.bring_up(&export, slots.filter(|_| zero_copy)).await {
            Ok(()) => Ok(export),
            Err(error) => {
                export.remove().await;
                Err(error)
            }
        }
    }

    /// Slots for the pages of requests; none where they are copied.
    fn zero_copy_slots(&self) -> Result<Option<BufferSlots>> {
        if self.options.zero_copy == ZeroCopy::Off {
            return Ok(None);
        }
        let tags = u32::from(self.options.queues) * u32::from(self.options.queue_depth);
        let slots = self.handle.ring().claim_buffer_slots(tags);
        match features::zero_copy_obstacle(self.offered, slots.is_some()) {
            None => Ok(slots),
            Some(obstacle) if self.options.zero_copy == ZeroCopy::On => {
                Err(Error::new(ErrorKind::Unsupported, obstacle))
            }
            Some(obstacle) => {
                tracing::info!(export = self.spec.id, obstacle, "requests will be copied");
                Ok(None)
            }
        }
    }

    async fn add(
        &self,
        control: &Control,
        zero_copy: bool,
        max_transfer: u32,
    ) -> Result<DeviceInfo> {
        let mut wanted = Features::UPDATE_SIZE | Features::NO_PARTITION_SCAN;
        wanted.set(ZERO_COPY_FEATURES, zero_copy);
        let most = if zero_copy { MOST_ZERO_COPY } else { MOST_COPY };
        let mut info = DeviceInfo {
            nr_hw_queues: self.options.queues,
            queue_depth: self.options.queue_depth,
            max_io_buf_bytes: most.min(max_transfer.max(4096)).min(MOST_BUFFER_BYTES),
            dev_id: self.options.device_id.unwrap_or(ANY_ID),
            flags: (wanted & self.offered).bits(),
            ublksrv_flags: Identity::own().flags(),
            ..DeviceInfo::default()
        };
        let added = control.run(move |ring| ring.add(&mut info).map(|()| info));
        match (added.await, self.options.device_id) {
            (Err(error), Some(id)) if error.errno() == Errno::EEXIST => {
                self.replace_left_behind(control, id, info).await
            }
            (added, id) => added.map_err(|error| features::explain_add(error, id)),
        }
    }

    /// The id is taken: perhaps by what a killed daemon left behind.
    async fn replace_left_behind(
        &self,
        control: &Control,
        id: u32,
        mut info: DeviceInfo,
    ) -> Result<DeviceInfo> {
        if !remove_left_behind(control, id).await {
            return Err(features::explain_add(Errno::EEXIST.into(), Some(id)));
        }
        let deadline = self.handle.now() + REMOVAL_LIMIT;
        loop {
            let added = control.run(move |ring| ring.add(&mut info).map(|()| info));
            match added.await {
                Err(error) if error.errno() == Errno::EEXIST && self.handle.now() < deadline => {
                    self.handle.sleep(POLL_INTERVAL).await;
                }
                Err(error) if error.errno() == Errno::EEXIST => {
                    return Err(features::left_behind_in_use(id));
                }
                added => return added.map_err(|error| features::explain_add(error, Some(id))),
            }
        }
    }

    /// From the added device to the disk that can be opened.
    async fn bring_up(&self, export: &Rc<UblkExport>, slots: Option<BufferSlots>) -> Result<()> {
        let device = &export.device;
        if self.options.zero_copy == ZeroCopy::On && !export.zero_copy {
            let message = "the kernel did not grant zero copy";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut parameters = self.parameters(export);
        let id = device.dev_id;
        let set = export
            .control
            .run(move |ring| ring.set_parameters(id, &mut parameters));
        set.await
            .map_err(|error| error.context("The ublk driver refused the disk's parameters"))?;
        let service = self.open_service(export, slots).await?;
        *export.service.borrow_mut() = Some(service.clone());
        set_io_flusher();
        for number in 0..device.nr_hw_queues {
            queue::start(self.handle, &service, number, device.queue_depth)?;
        }
        drop(service);
        self.show(export).await
    }

    fn parameters(&self, export: &UblkExport) -> Parameters {
        let node = export.root.node();
        let geometry = Geometry {
            size: node.size(),
            limits: node.driver().limits(),
            logical_block_size: export.logical_block_size,
            max_request: export.device.max_io_buf_bytes,
            read_only: !self.spec.writable,
            zero_copy: export.zero_copy,
        };
        geometry.parameters()
    }

    async fn open_service(
        &self,
        export: &UblkExport,
        slots: Option<BufferSlots>,
    ) -> Result<Rc<Service>> {
        let path = PathBuf::from(format!("/dev/ublkc{}", export.device_id()));
        wait_for_node(self.handle, &path).await?;
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|error| {
            Error::from(error).context(format!("Could not open '{}'", path.display()))
        })?;
        let transport = match slots {
            Some(slots) => Transport::ZeroCopy(slots),
            None => Transport::Copy {
                buffer_length: export.device.max_io_buf_bytes as usize,
            },
        };
        let ring = self.handle.ring();
        Ok(Rc::new(Service {
            ring: ring.clone(),
            device: ring.file(OwnedFd::from(file)),
            child: export.root.clone(),
            graph: self.graph.clone(),
            export_id: self.spec.id.clone(),
            transport,
            life: export.life.clone(),
        }))
    }

    /// Starts the disk: the kernel waits for every tag's fetch, and may read the disk before it is
    /// done. A fetch that fails ends the wait.
    async fn show(&self, export: &UblkExport) -> Result<()> {
        let (id, pid) = (export.device_id(), std::process::id());
        let starting = export.control.run(move |ring| ring.start(id, pid));
        let started = unless(starting, export.life.until_over()).await;
        let Some(started) = started else {
            let errno = export.life.failure().unwrap_or(Errno::ENODEV);
            return Err(Error::sys(errno, "The ublk queues could not be served"));
        };
        started.map_err(|error| error.context("Could not start the ublk disk"))?;
        export.live.set(true);
        wait_for_node(self.handle, &export.device_path()).await?;
        tracing::info!(
            export = export.id,
            device = %export.device_path().display(),
            zero_copy = export.zero_copy,
            queues = export.queues(),
            depth = export.queue_depth(),
            "ublk disk is there"
        );
        Ok(())
    }
}

/// The first of two futures, or `None` when the second is ready before it.
async fn unless<T>(first: impl Future<Output = T>, second: impl Future<Output = ()>) -> Option<T> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| {
        if let Poll::Ready(output) = first.as_mut().poll(context) {
            return Poll::Ready(Some(output));
        }
        second.as_mut().poll(context).map(|()| None)
    })
    .await
}

/// The sectors of a disk, which has whole logical blocks, at least one.
fn check_size(root: &Child, logical_block_size: u32) -> Result<u64> {
    let node = root.node();
    let sectors = parameters::sectors(node.size(), logical_block_size);
    if sectors == 0 {
        let message = format!(
            "Node '{}' of {} bytes is smaller than a block of {logical_block_size} bytes",
            node.name(),
            node.size()
        );
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    let shown = sectors << SECTOR_SHIFT;
    if shown < node.size() {
        tracing::warn!(
            node = node.name(),
            size = node.size(),
            shown,
            "size is not a multiple of the logical block size: the end is not shown"
        );
    }
    Ok(sectors)
}

/// Has a dead device of that id removed that an ended process of this program left behind; whether
/// there was one. Its disk may still be mounted: then it goes when that ends.
async fn remove_left_behind(control: &Control, id: u32) -> bool {
    let Ok(info) = control.run(move |ring| ring.info(id)).await else {
        return false;
    };
    if !identity::is_left_behind(&info) {
        return false;
    }
    tracing::info!(id, "removing the dead ublk device of an ended daemon");
    if let Err(error) = control.run(move |ring| ring.delete_later(id)).await {
        tracing::warn!(id, %error, "dead ublk device not removed");
    }
    true
}

/// devtmpfs makes the nodes.
async fn wait_for_node(handle: &Handle, path: &Path) -> Result<()> {
    let deadline = handle.now() + NODE_LIMIT;
    while !is_device(path) {
        if handle.now() >= deadline {
            let name = path.display();
            let message = match path.exists() {
                true => format!("'{name}' is no device: something else took its name"),
                false => format!("'{name}' did not appear: is /dev a devtmpfs?"),
            };
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        handle.sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_block_device() || kind.is_char_device()
    })
}

/// Lets the thread's allocations not wait for writeback, which may be its own disk's.
fn set_io_flusher() {
    // SAFETY: a prctl without pointers.
    let set = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if let Err(errno) = Errno::result(set) {
        tracing::debug!(%errno, "PR_SET_IO_FLUSHER was refused");
    }
}

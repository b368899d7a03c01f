//! The export: a device from its start to its removal.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

use nix::errno::Errno;

use super::abi::{DeviceInfo, Features};
use super::bring_up::Plan;
use super::control::Control;
use super::features;
use super::identity::Identity;
use super::mounts;
use super::openers;
use super::options::UblkOptions;
use super::parameters;
use super::queue::{Life, Service};
use super::subprocess::Task;
use crate::block::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Export, ExportSpec, ExportType, Exports, LocalFuture, RemoveMode};
use crate::runtime::Handle;

/// A node shown as `/dev/ublkbN`.
pub struct UblkExport {
    pub(super) id: String,
    pub(super) root: Rc<Child>,
    pub(super) handle: Handle,
    pub(super) control: Control,
    pub(super) device: DeviceInfo,
    pub(super) granted: Features,
    pub(super) zero_copy: bool,
    pub(super) logical_block_size: u32,
    pub(super) life: Rc<Life>,
    /// The disk was shown.
    pub(super) live: Cell<bool>,
    pub(super) closing: Cell<bool>,
    /// The size that the kernel was told last.
    pub(super) sectors_told: Cell<u64>,
    /// What the tags share, until the device is removed.
    pub(super) service: RefCell<Option<Rc<Service>>>,
}

impl UblkExport {
    /// Makes the device and serves it; done when `/dev/ublkbN` can be opened. The export is
    /// registered with `exports`, and leaves by itself when somebody stops the device from outside.
    ///
    /// # Errors
    /// What is missing on this machine and what to do about it; what of the options is wrong; what
    /// keeps the node from being exported. Nothing is left behind.
    pub async fn start(
        exports: &Exports,
        spec: &ExportSpec,
        options: &UblkOptions,
    ) -> Result<Rc<UblkExport>> {
        let node = exports.check(spec)?;
        options.check()?;
        let control = Control::open().await?;
        let offered = control.run(features::detect).await?;
        let resizable = offered.contains(Features::UPDATE_SIZE);
        let root = exports.attach(&node, spec.writable, resizable)?;
        let plan = Plan {
            handle: exports.handle(),
            graph: exports.graph(),
            offered,
            spec,
            options,
        };
        match plan.carry_out(control, root.clone()).await {
            Ok(export) => {
                exports.insert(export.clone());
                exports
                    .handle()
                    .spawn(export.clone().watch(exports.clone()))
                    .detach();
                Ok(export)
            }
            Err(error) => {
                if let Err(other) = exports.graph().detach(&root).await {
                    tracing::error!(export = spec.id, error = %other, "node not closed");
                }
                Err(error)
            }
        }
    }

    /// The disk's device node.
    pub fn device_path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/{}", self.disk_name()))
    }

    /// The ublk device id.
    pub fn device_id(&self) -> u32 {
        self.device.dev_id
    }

    /// Requests' pages go to the images without a copy.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Hardware queues as granted.
    pub fn queues(&self) -> u16 {
        self.device.nr_hw_queues
    }

    /// Requests per queue as granted.
    pub fn queue_depth(&self) -> u16 {
        self.device.queue_depth
    }

    /// Bytes of a logical block.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// Sectors of the node now.
    fn sectors(&self) -> u64 {
        parameters::sectors(self.root.node().size(), self.logical_block_size)
    }

    /// Tells the kernel of another size, whose users see it at once.
    async fn tell_size(&self) -> Result<()> {
        let sectors = self.sectors();
        // Before it is live, an update is a null dereference in some kernels.
        if self.sectors_told.replace(sectors) == sectors || self.closing.get() {
            return Ok(());
        }
        if !self.live.get() {
            return Err(Error::from_errno(
                Errno::ENODEV,
                "the ublk disk is not live",
            ));
        }
        if !self.granted.contains(Features::UPDATE_SIZE) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "changing the size of a ublk disk in use needs Linux 6.16 or later",
            ));
        }
        let id = self.device_id();
        self.control
            .run(move |ring| ring.update_size(id, sectors))
            .await
    }

    fn disk_name(&self) -> String {
        format!("ublkb{}", self.device_id())
    }

    /// Somebody stopped the device, or serving failed: the export goes.
    async fn watch(self: Rc<UblkExport>, exports: Exports) {
        self.life.until_over().await;
        if self.closing.get() {
            return;
        }
        match self.life.failure() {
            Some(errno) => tracing::error!(export = self.id, %errno, "ublk device failed"),
            None => tracing::info!(export = self.id, "ublk device was stopped from outside"),
        }
        if let Err(error) = exports.remove(&self.id, RemoveMode::Hard).await {
            tracing::debug!(export = self.id, %error, "export is going already");
        }
    }

    /// Stops and deletes the device; done when it is gone, or what keeps it was logged.
    pub(super) async fn remove(&self) {
        let (id, identity) = (self.device_id(), Identity::own());
        self.closing.set(true);
        self.perform(Task::Stop { id, identity }).await;
        self.life.until_idle().await;
        // Deleting waits for the character device, which the last of these closes.
        drop(self.service.take());
        self.perform(Task::Delete { id, identity }).await;
    }

    /// In a helper process; where none can be started, here: this thread is alive and serves.
    async fn perform(&self, task: Task) {
        let helped = self.handle.blocking(move || task.run()).await;
        let Err(error) = helped else { return };
        tracing::warn!(export = self.id, %error, "no helper process: doing its work here");
        if let Err(error) = self.control.run(move |_| task.perform()).await {
            tracing::error!(export = self.id, ?task, %error, "ublk device is left behind");
        }
    }
}

impl Export for UblkExport {
    fn id(&self) -> &str {
        &self.id
    }

    fn export_type(&self) -> ExportType {
        ExportType::Ublk
    }

    fn root(&self) -> &Rc<Child> {
        &self.root
    }

    fn is_in_use(&self) -> bool {
        let disk = self.disk_name();
        self.live.get() && (mounts::is_held(&disk) || openers::has_openers(&disk))
    }

    fn update_size(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.tell_size())
    }

    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(self.remove())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

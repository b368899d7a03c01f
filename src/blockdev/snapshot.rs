//! Overlays put on top of nodes in use.
//!
//! The overlay is created and opened first. Then, in one short drained section, the old node is
//! flushed, the overlay gets it as backing file, and its users are moved to the overlay. The old node
//! turns read-only and closes its file for writing. At every moment the images on disk are a valid
//! chain: before the move nothing is written to the overlay, after it nothing to the old image.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::block::{
    Action, Child, DrainedSection, IoFuture, Node, NodeOptions, Permission, Permissions, Stage,
};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::file::{Created, FileKind};

use super::chain::note_automatic;
use super::description::{
    BackingDescription, ChildDescription, Description, DriverOptions, FileDescription,
    Qcow2Description, SharedOptions,
};
use super::effective::Source;
use super::nbd_description::NbdDescription;
use super::origin::Origin;
use super::value::invalid;
use super::{Blockdev, backing_name, check_not_busy, file_name, names};

/// Whether the overlay's image is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotMode {
    /// A new image that names the old node's file as backing file.
    #[default]
    AbsolutePaths,
    /// The image is there, with whatever its header says.
    Existing,
}

/// Arguments of `blockdev-snapshot-sync`.
#[derive(Clone, Debug, Default)]
pub struct SnapshotSync {
    /// A device's name; there are none, so that it finds nothing.
    pub device: Option<String>,
    /// The node that gets an overlay.
    pub node_name: Option<String>,
    /// File of the overlay.
    pub snapshot_file: String,
    /// Name of the overlay's node.
    pub snapshot_node_name: Option<String>,
    /// Format of the overlay; qcow2 where it is not given.
    pub format: Option<String>,
    /// Whether the overlay's image is made.
    pub mode: SnapshotMode,
}

/// An overlay that is ready to be put on top of a node: a change for [`Graph::transact`].
///
/// [`Graph::transact`]: crate::block::Graph::transact
pub struct Snapshot {
    blockdev: Blockdev,
    old: Rc<Node>,
    overlay: Rc<Node>,
    /// The overlay was opened for this, and goes if nobody uses it.
    opened: bool,
    /// Its image was made for this.
    created: RefCell<Option<Created>>,
    /// Users of the old node that were moved to the overlay.
    moved: RefCell<Vec<Rc<Child>>>,
    /// The old node was turned read-only.
    closed: Cell<bool>,
}

impl Blockdev {
    /// `blockdev-snapshot-sync`: creates or opens an overlay and puts it on top of a node.
    ///
    /// # Errors
    /// In QEMU's words; the graph is as it was, and a file that was not there before is removed.
    pub async fn snapshot_sync(&self, request: SnapshotSync) -> Result<()> {
        let snapshot = self.prepare_snapshot_sync(request).await?;
        self.graph.transact(&[Box::new(snapshot)]).await
    }

    /// `blockdev-snapshot`: puts a node that is there on top of another.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed.
    pub async fn snapshot(&self, node: &str, overlay: &str) -> Result<()> {
        let snapshot = self.prepare_snapshot(node, overlay).await?;
        self.graph.transact(&[Box::new(snapshot)]).await
    }

    /// What `blockdev-snapshot-sync` does before guest requests have to wait: the overlay is there and open.
    ///
    /// # Errors
    /// As [`Blockdev::snapshot_sync`].
    pub async fn prepare_snapshot_sync(&self, request: SnapshotSync) -> Result<Snapshot> {
        let (device, node_name) = (request.device.as_deref(), request.node_name.as_deref());
        let old = names::find_device_or_node(&self.graph, device, node_name)?;
        check_not_busy(&old)?;
        self.flush_old(&old).await?;
        let Some(name) = &request.snapshot_node_name else {
            return Err(invalid("New overlay node-name missing"));
        };
        if self.graph.find(name).is_some() {
            return Err(invalid("New overlay node-name already in use"));
        }
        let format = request.format.as_deref().unwrap_or("qcow2");
        let created = match request.mode {
            SnapshotMode::Existing => None,
            SnapshotMode::AbsolutePaths => Some(
                self.create_image_file(&request.snapshot_file, format, old.size(), Some(&old))
                    .await?,
            ),
        };
        match self.open_overlay(&old, &request, name, format).await {
            Ok(overlay) => Ok(Snapshot {
                opened: true,
                created: RefCell::new(created),
                ..Snapshot::new(self, old, overlay)
            }),
            Err(error) => {
                self.undo_created(created).await;
                Err(error)
            }
        }
    }

    /// What `blockdev-snapshot` does before guest requests have to wait.
    ///
    /// # Errors
    /// As [`Blockdev::snapshot`].
    pub async fn prepare_snapshot(&self, node: &str, overlay: &str) -> Result<Snapshot> {
        let old = names::find_either(&self.graph, node)?;
        check_not_busy(&old)?;
        self.flush_old(&old).await?;
        let overlay = names::find_either(&self.graph, overlay)?;
        check_overlay(&overlay)?;
        Ok(Snapshot::new(self, old, overlay))
    }

    /// Flushes while requests go on, so that little is left for the drained section.
    async fn flush_old(&self, old: &Rc<Node>) -> Result<()> {
        if old.options().read_only {
            return Ok(());
        }
        let edge = self.graph.attach_root("snapshot", old, Permissions::NONE)?;
        let flushed = edge.flush().await;
        self.leave(edge, old).await?;
        flushed.map_err(|error| error.context(format!("Write to node '{}' failed", old.name())))
    }

    /// Gives up an edge; the node below stays, whoever uses it.
    pub(super) async fn leave(&self, edge: Rc<Child>, node: &Rc<Node>) -> Result<()> {
        let owned = node.is_monitor_owned();
        node.set_monitor_owned(true);
        let left = self.graph.detach(&edge).await;
        node.set_monitor_owned(owned);
        left
    }

    async fn open_overlay(
        &self,
        old: &Rc<Node>,
        request: &SnapshotSync,
        name: &str,
        format: &str,
    ) -> Result<Rc<Node>> {
        let description = self
            .overlay_description(old, &request.snapshot_file, name, format)
            .await?;
        let overlay = self.open(description, Source::Defaults).await?;
        match check_overlay(&overlay) {
            Ok(()) => Ok(overlay),
            Err(error) => {
                self.graph.release(&overlay).await?;
                Err(error)
            }
        }
    }

    /// The overlay is opened as the old node was, without its backing file.
    async fn overlay_description(
        &self,
        old: &Rc<Node>,
        filename: &str,
        name: &str,
        format: &str,
    ) -> Result<Description> {
        let like = old.options();
        let nothing = BackingDescription::Nothing;
        let mut overlay = self
            .image_description(&like, filename, format, nothing)
            .await?;
        overlay.node_name = Some(name.to_owned());
        Ok(overlay)
    }

    /// What a name means: an export of an NBD server, a file or a device.
    async fn protocol_of(&self, filename: &str) -> Result<DriverOptions> {
        if let Some(nbd) = NbdDescription::of_name(filename) {
            return nbd.map(DriverOptions::Nbd);
        }
        let path = filename.to_owned();
        let is_device = self
            .handle
            .blocking(move || backing_name::leads_to_device(&path))
            .await;
        let kind = if is_device {
            FileKind::Device
        } else {
            FileKind::Regular
        };
        let file = FileDescription::named(filename, kind);
        Ok(DriverOptions::File(file))
    }

    /// Describes an image in a file, on a device or on a server, opened with the options of another node.
    pub(super) async fn image_description(
        &self,
        like: &NodeOptions,
        filename: &str,
        format: &str,
        backing: BackingDescription,
    ) -> Result<Description> {
        let inline = Description {
            node_name: None,
            shared: SharedOptions::default(),
            driver: self.protocol_of(filename).await?,
        };
        let file = ChildDescription::Inline(Box::new(inline));
        let driver = match format {
            "qcow2" => DriverOptions::Qcow2 {
                file,
                backing,
                options: Qcow2Description::default(),
            },
            "raw" => DriverOptions::Raw {
                file,
                part: Default::default(),
            },
            other => {
                let message = format!("Unknown driver '{other}'");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        Ok(Description {
            node_name: None,
            shared: SharedOptions {
                read_only: Some(like.read_only),
                auto_read_only: Some(like.auto_read_only),
                force_share: Some(like.force_share),
                cache_direct: Some(like.cache_direct),
                cache_no_flush: Some(like.cache_no_flush),
                discard: Some(like.discard),
                detect_zeroes: None,
            },
            driver,
        })
    }
}

impl Snapshot {
    fn new(blockdev: &Blockdev, old: Rc<Node>, overlay: Rc<Node>) -> Snapshot {
        Snapshot {
            blockdev: blockdev.clone(),
            old,
            overlay,
            opened: false,
            created: RefCell::default(),
            moved: RefCell::default(),
            closed: Cell::default(),
        }
    }

    /// Puts the overlay on top of the old node and moves its users.
    async fn install(&self, drained: &DrainedSection) -> Result<()> {
        let Snapshot { old, overlay, .. } = self;
        // Those before this one in a transaction may have used either.
        check_not_busy(old)?;
        check_overlay(overlay)?;
        let graph = &self.blockdev.graph;
        let mut users = old.parents();
        users.retain(|edge| edge.follows());
        if !old.options().read_only {
            old.driver()
                .flush()
                .await
                .map_err(|error| error.context(format!("Write to node '{}' failed", old.name())))?;
        }
        graph.set_backing(drained, overlay, Some(old))?;
        let moved = graph.redirect(drained, &users, overlay);
        *self.moved.borrow_mut() = users;
        moved.map_err(|error| match self.take_back(drained) {
            Ok(()) => error,
            Err(_) => error.context(format!("The overlay '{}' stays on top", overlay.name())),
        })
    }

    /// Nobody writes the old node any more.
    async fn close_old(&self) -> Result<()> {
        let was_writable = !self.old.options().read_only;
        self.blockdev.make_read_only(&self.old).await?;
        self.closed.set(was_writable);
        Ok(())
    }

    async fn uninstall(&self, drained: &DrainedSection) -> Result<()> {
        if self.closed.take() {
            self.blockdev.make_writable(&self.old).await?;
        }
        self.take_back(drained)
    }

    /// Undoes the move. Where that fails (another process has taken a lock that was given up a
    /// moment ago), the overlay stays on top: that chain is as good as the old one.
    fn take_back(&self, drained: &DrainedSection) -> Result<()> {
        let Snapshot { old, overlay, .. } = self;
        let graph = &self.blockdev.graph;
        let back = graph.redirect(drained, &self.moved.borrow(), old);
        back.and_then(|()| graph.set_backing(drained, overlay, None))
            .inspect_err(|error| {
                tracing::error!(node = old.name(), overlay = overlay.name(), %error,
                    "a failed snapshot cannot be undone; the overlay stays");
            })
    }

    /// What is left to be done when requests go on.
    async fn clean_up(&self, made: bool) -> Result<()> {
        let graph = &self.blockdev.graph;
        note_automatic(&self.overlay);
        file_name::refresh(&self.overlay);
        if !self.opened {
            return Ok(());
        }
        let stays_on_top = self.overlay.backing().is_some();
        // Without users the overlay goes at once, as in QEMU; one that failed has none.
        let released = graph.release(&self.overlay).await;
        file_name::refresh_all(graph);
        let useless = self.created.take().filter(|_| !made && !stays_on_top);
        self.blockdev.undo_created(useless).await;
        released
    }
}

impl Action for Snapshot {
    fn nodes(&self) -> Vec<Rc<Node>> {
        vec![self.old.clone(), self.overlay.clone()]
    }

    fn make<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(self.install(drained))
    }

    fn store<'a>(&'a self, _drained: &'a DrainedSection, stage: Stage) -> IoFuture<'a, ()> {
        match stage {
            // The last thing: until then other actions may change what is stored in it.
            Stage::Closing => Box::pin(self.close_old()),
            Stage::Gains | Stage::Losses => Box::pin(async { Ok(()) }),
        }
    }

    fn undo<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()> {
        Box::pin(self.uninstall(drained))
    }

    fn settle(&self, made: bool) -> IoFuture<'_, ()> {
        Box::pin(self.clean_up(made))
    }
}

fn check_overlay(overlay: &Rc<Node>) -> Result<()> {
    let in_use = |text: &str| Err(Error::new(ErrorKind::InUse, text));
    let users = overlay.users().required;
    if users.contains(Permission::CONSISTENT_READ) {
        return in_use("The overlay is already in use");
    }
    overlay.check_unoccupied()?;
    if overlay.driver().is_filter() {
        return in_use("Filters cannot be used as overlays");
    }
    if overlay.backing().is_some() {
        return in_use("The overlay already has a backing image");
    }
    let supported =
        Origin::of(overlay).is_some_and(|origin| origin.given.borrow().driver.backing().is_some());
    if !supported {
        return in_use("The overlay does not support backing images");
    }
    Ok(())
}

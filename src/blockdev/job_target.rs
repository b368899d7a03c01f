//! The target of `drive-mirror` and `drive-backup`: an image that is made, or one that is there.

use std::rc::Rc;

use crate::block::{Child, DetectZeroes, DiscardMode, Driver as _, Node, NodeOptions, Permissions};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::file::Created;
use crate::protocol::nbd::Nbd;

use super::backing_name::{looks_like, path_of};
use super::description::{BackingDescription, ChildDescription};
use super::effective::Source;
use super::nbd_description::NbdDescription;
use super::snapshot_file::CANNOT_CREATE;
use super::{Blockdev, SnapshotMode, file_name, names};

/// What the target is to be.
pub struct NewTarget<'a> {
    /// The node that is copied: the target is opened as it is, but writable.
    pub source: &'a Rc<Node>,
    /// File, device or NBD export of the target.
    pub filename: &'a str,
    /// Format; where it is not given that of the source, or raw for an image that is there.
    pub format: Option<&'a str>,
    /// Whether the image is made.
    pub mode: SnapshotMode,
    /// Name of the target's node.
    pub node_name: Option<&'a str>,
    /// What the header of a new image names as backing file.
    pub backing: Option<&'a Rc<Node>>,
    /// What the target has below it when it is opened.
    pub below: TargetBelow<'a>,
    /// Discards and zeroes make the target smaller, whatever the source does with them.
    pub stays_small: bool,
}

/// The backing file of a target that was opened.
#[derive(Clone, Copy, Debug)]
pub enum TargetBelow<'a> {
    /// None yet, or never.
    Nothing,
    /// What the header of an image that is there names.
    Named,
    /// This node.
    Node(&'a Rc<Node>),
}

/// A target that was opened, and stays so until it is settled.
pub struct JobTarget {
    /// The target.
    pub node: Rc<Node>,
    hold: Rc<Child>,
    created: Option<Created>,
}

impl Blockdev {
    /// Creates or opens the target of a job.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open, and a file that was not there before is removed.
    pub async fn open_job_target(&self, wanted: NewTarget<'_>) -> Result<JobTarget> {
        let filename = match NbdDescription::of_name(wanted.filename) {
            Some(nbd) => {
                nbd?;
                wanted.filename
            }
            None => path_of(wanted.filename)?,
        };
        if let Some(name) = wanted.node_name {
            names::check_new(&self.graph, name)?;
        }
        let created = match wanted.mode {
            SnapshotMode::Existing => None,
            SnapshotMode::AbsolutePaths => {
                self.check_creatable(&wanted).await?;
                let (format, size) = (self.format_of(&wanted), wanted.source.size());
                let made = self.create_image_file(filename, format, size, wanted.backing);
                Some(made.await?)
            }
        };
        match self.open_target(&wanted, filename).await {
            Ok((node, hold)) => Ok(JobTarget {
                node,
                hold,
                created,
            }),
            Err(error) => {
                self.undo_created(created).await;
                Err(error)
            }
        }
    }

    /// The target has other users, or none: then it goes. `failed`: so does the file that was made for it.
    ///
    /// # Errors
    /// What closing it says.
    pub async fn settle_job_target(&self, target: JobTarget, failed: bool) -> Result<()> {
        let settled = self.graph.detach(&target.hold).await;
        if failed {
            self.undo_created(target.created).await;
        }
        file_name::refresh_all(&self.graph);
        settled
    }

    /// Images are not made on NBD servers; what cannot be reached either is told, too, as QEMU does.
    async fn check_creatable(&self, wanted: &NewTarget<'_>) -> Result<()> {
        let Some(nbd) = NbdDescription::of_name(wanted.filename) else {
            return Ok(());
        };
        let options = nbd?.options(&NodeOptions::default());
        let message = match Nbd::open(&self.handle, options).await {
            Ok(nbd) => {
                nbd.close().await?;
                CANNOT_CREATE.to_owned()
            }
            Err(error) => format!(
                "{CANNOT_CREATE}; however, opening the given target as an existing image failed: \
                 {error}"
            ),
        };
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    fn format_of<'a>(&self, wanted: &NewTarget<'a>) -> &'a str {
        let own = || match wanted.mode {
            SnapshotMode::Existing => "raw",
            SnapshotMode::AbsolutePaths => wanted.source.without_filters().driver().driver_name(),
        };
        wanted.format.unwrap_or_else(own)
    }

    async fn open_target(
        &self,
        wanted: &NewTarget<'_>,
        filename: &str,
    ) -> Result<(Rc<Node>, Rc<Child>)> {
        let like = NodeOptions {
            read_only: false,
            auto_read_only: false,
            force_share: false,
            ..wanted.source.options()
        };
        let backing = match wanted.below {
            TargetBelow::Nothing => BackingDescription::Nothing,
            TargetBelow::Named => BackingDescription::FromHeader,
            TargetBelow::Node(node) => {
                BackingDescription::Child(ChildDescription::Reference(node.name().to_owned()))
            }
        };
        let format = self.format_of(wanted);
        let described = self.image_description(&like, filename, format, backing);
        let mut description = described.await?;
        description.node_name = wanted.node_name.map(str::to_owned);
        if wanted.stays_small {
            description.shared.discard = Some(DiscardMode::Unmap);
            description.shared.detect_zeroes = Some(DetectZeroes::Unmap);
        }
        let node = self.open(description, Source::Defaults).await?;
        if wanted.mode == SnapshotMode::Existing
            && wanted.format.is_none()
            && let Err(error) = check_raw(&node, filename).await
        {
            self.discard_failed(&node).await;
            return Err(error);
        }
        match self.graph.attach_root("mirror", &node, Permissions::NONE) {
            Ok(hold) => Ok((node, hold)),
            Err(error) => {
                self.discard_failed(&node).await;
                Err(error)
            }
        }
    }
}

/// Formats are not guessed; what looks like one is not overwritten as raw, either.
async fn check_raw(node: &Node, filename: &str) -> Result<()> {
    match looks_like(node).await? {
        None => Ok(()),
        Some(format) => {
            let message = format!(
                "'{filename}' looks like a {format} image, but its format was not specified; give \
                 'format'"
            );
            Err(Error::new(ErrorKind::InvalidImage, message))
        }
    }
}

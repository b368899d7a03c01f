//! Arguments of `liveblk image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::error::Result;

use super::args::Output;
use super::format::Format;
use super::size;

/// Create, describe and check images that no daemon serves.
///
/// The format of an image is declared with --format, or said by the file's name (.qcow2 or .raw);
/// it is never looked for in the image's contents.
#[derive(Debug, Subcommand)]
#[command(verbatim_doc_comment)]
pub(super) enum ImageCommand {
    Create(CreateArguments),
    Info(InfoArguments),
    Check(CheckArguments),
    Snapshot(ImageSnapshotArguments),
}

/// An image by name and format.
#[derive(Args, Debug)]
pub(super) struct ImageFile {
    /// The image
    #[arg(value_name = "FILE")]
    pub(super) file: PathBuf,

    /// Format of the image
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,
}

impl ImageFile {
    /// The format, declared or by the file's name.
    ///
    /// # Errors
    /// Neither says.
    pub(super) fn format(&self) -> Result<Format> {
        Format::of(&self.file, self.format)
    }
}

/// Create an image.
///
/// It is durable when the command returns; a file that exists is not touched without --force.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Options of qcow2 images (-o): cluster_size (512 to 2M; 64k), compat (0.10, 1.1; 1.1), refcount_bits
(1 to 64; 16), lazy_refcounts (on, off; off), compression_type (zlib, zstd; zlib), preallocation
(off, metadata; off). Raw images have none.

Examples:
  liveblk image create disk.qcow2 20G
  liveblk image create -b disk.qcow2 -F qcow2 overlay.qcow2
  liveblk image create -f qcow2 -o cluster_size=128k,lazy_refcounts=on disk 1T"
)]
pub(super) struct CreateArguments {
    /// The image
    #[arg(value_name = "FILE")]
    pub(super) file: PathBuf,

    /// Size of the disk: bytes, or with a suffix k, M, G, T, P or E; the backing file's if not given
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub(super) size: Option<u64>,

    /// Format of the image
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,

    /// Backing file, relative to the directory of FILE
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub(super) backing: Option<PathBuf>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_enum, requires = "backing")]
    pub(super) backing_format: Option<Format>,

    /// Options of the format
    #[arg(
        short,
        long = "option",
        value_name = "NAME=VALUE",
        value_delimiter = ','
    )]
    pub(super) options: Vec<String>,

    /// Overwrite a file that exists
    #[arg(long)]
    pub(super) force: bool,
}

/// Describe an image.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk image info disk.qcow2
  liveblk image info --backing-chain overlay.qcow2
  liveblk image info --format raw --output json /dev/vg0/disk"
)]
pub(super) struct InfoArguments {
    #[command(flatten)]
    pub(super) image: ImageFile,

    /// How to write it
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,

    /// Open the image although another process writes to it; what is shown may be outdated
    #[arg(short = 'U', long)]
    pub(super) force_share: bool,

    /// Describe the backing files too, down to the base
    #[arg(long)]
    pub(super) backing_chain: bool,
}

/// Check the consistency of an image. Nothing is repaired.
///
/// What is found is told on stderr, the sum on stdout.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Exit status: 0 no errors, 1 the check failed, 2 corruptions, 3 leaked clusters only.

Examples:
  liveblk image check disk.qcow2
  liveblk image check --output json disk.qcow2"
)]
pub(super) struct CheckArguments {
    #[command(flatten)]
    pub(super) image: ImageFile,

    /// How to write it
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,

    /// Open the image although another process writes to it; what is found may be wrong
    #[arg(short = 'U', long)]
    pub(super) force_share: bool,
}

/// List, make, delete or go back to internal snapshots of an image that nobody uses.
///
/// A snapshot is found by its name or, where none has that name, by its id. Going back gives the disk the
/// content and the size that it had; what it has now is lost, unless a snapshot has it, too. For images
/// that a daemon serves: liveblk qmp blockdev-snapshot-internal-sync.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk image snapshot disk.qcow2
  liveblk image snapshot -c before-upgrade disk.qcow2
  liveblk image snapshot -a before-upgrade disk.qcow2
  liveblk image snapshot -d before-upgrade disk.qcow2"
)]
pub(super) struct ImageSnapshotArguments {
    #[command(flatten)]
    pub(super) image: ImageFile,

    /// List the snapshots; this is what is done without another option
    #[arg(short, long, group = "action")]
    pub(super) list: bool,

    /// Make a snapshot of this name
    #[arg(short, long, value_name = "NAME", group = "action")]
    pub(super) create: Option<String>,

    /// Go back to this snapshot
    #[arg(short, long, value_name = "SNAPSHOT", group = "action")]
    pub(super) apply: Option<String>,

    /// Delete this snapshot
    #[arg(short, long, value_name = "SNAPSHOT", group = "action")]
    pub(super) delete: Option<String>,

    /// How to write the list
    #[arg(long, value_enum, default_value = "human", conflicts_with_all = ["create", "apply", "delete"])]
    pub(super) output: Output,

    /// List although another process writes to the image; what is shown may be outdated
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub(super) force_share: bool,
}

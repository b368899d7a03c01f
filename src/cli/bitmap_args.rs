//! Arguments of `liveblk bitmap`.

use clap::{Args, Subcommand};

use super::args::{EndpointArguments, Output};
use super::size;

/// Record which parts of a disk change: dirty bitmaps of nodes.
#[derive(Debug, Subcommand)]
pub(super) enum BitmapCommand {
    List(BitmapListArguments),
    Add(BitmapAddArguments),
    /// Take a bitmap away, from the image, too
    Remove(BitmapName),
    /// Forget what was recorded
    Clear(BitmapName),
    /// Record from now on
    Enable(BitmapName),
    /// Record no more
    Disable(BitmapName),
    Merge(BitmapMergeArguments),
}

/// Which bitmap is meant.
#[derive(Args, Debug)]
pub(super) struct BitmapName {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// The node that has it: a device path, the id of an export, or a node-name; needed if more than one
    /// node is exported
    #[arg(long = "of", value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// Name of the bitmap
    #[arg(value_name = "BITMAP")]
    pub(super) bitmap: String,
}

/// Show bitmaps: how much is dirty in each, and in which state it is.
#[derive(Args, Debug)]
pub(super) struct BitmapListArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// Only of this node: a device path, the id of an export, or a node-name
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// How to write it
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,
}

/// Begin to record which parts of a disk change.
///
/// A persistent bitmap is stored in the qcow2 image and is there again when the image is opened again, by
/// QEMU or liveblk; by liveblk also after a crash or power loss, then perhaps with more marked than has
/// changed, never with less.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk bitmap add --persistent daily
  liveblk bitmap add --granularity 4k --of /dev/ublkb0 fine"
)]
pub(super) struct BitmapAddArguments {
    #[command(flatten)]
    pub(super) bitmap: BitmapName,

    /// Bytes that a mark stands for, a power of two from 512 to 2G; the cluster size within 4k and 64k if not
    /// given
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    pub(super) granularity: Option<u64>,

    /// Store it with the image
    #[arg(short, long)]
    pub(super) persistent: bool,

    /// Do not record yet
    #[arg(long)]
    pub(super) disabled: bool,
}

/// Mark in a bitmap what is marked in others of the same node.
#[derive(Args, Debug)]
pub(super) struct BitmapMergeArguments {
    #[command(flatten)]
    pub(super) bitmap: BitmapName,

    /// The others
    #[arg(value_name = "FROM", required = true)]
    pub(super) sources: Vec<String>,
}

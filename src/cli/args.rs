//! What may stand on the command line. The help texts are the manual page's text too.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use super::backup_args::{BackupArguments, CheckpointArguments};
use super::bitmap_args::BitmapCommand;
use super::format::Format;
use super::image_args::ImageCommand;
use super::job_args::{
    CommitArguments, JobCommand, JobsArguments, MirrorArguments, StreamArguments,
};

/// Serve disk images as block devices, and work with what runs.
///
/// A running instance (made by `liveblk serve` or by liveblkd) is reached over its control socket:
/// --socket PATH, or --name NAME for NAME.sock in the directory of control sockets, or neither if
/// only one socket is there. The directory is $LIVEBLK_RUNTIME_DIR, else /run/liveblk for root, else
/// $XDG_RUNTIME_DIR/liveblk.
#[derive(Debug, Parser)]
#[command(name = "liveblk", version, verbatim_doc_comment)]
#[command(after_help = "Exit status: 0 done, 1 failed, 2 wrong command line.")]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Serve(ServeArguments),
    Snapshot(SnapshotArguments),
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    Chain(ChainArguments),
    Stream(StreamArguments),
    Commit(CommitArguments),
    Mirror(MirrorArguments),
    Backup(BackupArguments),
    Checkpoint(CheckpointArguments),
    Jobs(JobsArguments),
    #[command(subcommand)]
    Job(JobCommand),
    Qmp(QmpArguments),
    #[command(subcommand)]
    Image(ImageCommand),
    DeviceName(DeviceNameArguments),
}

/// The definition of the command line, for the manual page.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Which running instance is meant.
#[derive(Args, Debug)]
pub(super) struct EndpointArguments {
    /// Name of the instance
    #[arg(short, long, value_name = "NAME", conflicts_with = "socket")]
    pub(super) name: Option<String>,

    /// Path of the instance's control socket
    #[arg(short, long, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
}

impl EndpointArguments {
    /// As they were given, each with a space before it, to be put into a command that is told to somebody.
    pub(super) fn words(&self) -> String {
        match (&self.name, &self.socket) {
            (Some(name), _) => format!(" --name {name}"),
            (None, Some(socket)) => format!(" --socket {}", socket.display()),
            (None, None) => String::new(),
        }
    }
}

/// How a result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// Text for people.
    Human,
    /// JSON for programs.
    Json,
}

/// Serve images as block devices, until told to stop.
///
/// Each image is opened with its backing chain and becomes a ublk device. When all devices are
/// usable, their paths are printed on stdout in the order of the images, one per line. SIGINT,
/// SIGTERM and `liveblk qmp quit` stop it: the devices go and the images are clean.
///
/// The instance can be reached over a control socket for `liveblk snapshot`, `chain` and `qmp`; it is
/// called after the first image if neither --name nor --socket is given.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk serve disk.qcow2
  liveblk serve --name vm1 --direct --device-id 7 disk.qcow2
  liveblk serve --format raw --read-only /dev/vg0/disk
  liveblk serve --nbd disk.nbd disk.qcow2"
)]
pub(super) struct ServeArguments {
    /// The images
    #[arg(value_name = "IMAGE", required = true)]
    pub(super) images: Vec<PathBuf>,

    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// Format of the images; said by their names (.qcow2 or .raw) if not given
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,

    /// Let nobody write
    #[arg(short, long)]
    pub(super) read_only: bool,

    /// Go past the page cache to the image files (O_DIRECT)
    #[arg(short, long)]
    pub(super) direct: bool,

    /// Number of the device, /dev/ublkbN; repeated for each image
    #[arg(long = "device-id", value_name = "N", conflicts_with = "nbd")]
    pub(super) device_ids: Vec<u32>,

    /// Whether requests' pages go to the images without a copy; auto if not given
    #[arg(long, value_enum, value_name = "MODE", conflicts_with = "nbd")]
    pub(super) zero_copy: Option<ZeroCopyMode>,

    /// Hardware queues of a device
    #[arg(long, value_name = "N", conflicts_with = "nbd")]
    pub(super) queues: Option<u16>,

    /// Requests per queue at a time
    #[arg(long, value_name = "N", conflicts_with = "nbd")]
    pub(super) queue_depth: Option<u16>,

    /// Bytes of a sector, 512 or 4096
    #[arg(long, value_name = "BYTES", conflicts_with = "nbd")]
    pub(super) logical_block_size: Option<u32>,

    /// Serve over NBD on this UNIX socket instead (needs no ublk); URIs are printed
    #[arg(long, value_name = "SOCKET")]
    pub(super) nbd: Option<PathBuf>,
}

/// Whether to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ZeroCopyMode {
    /// Where the kernel can.
    Auto,
    /// Refuse to start where it cannot.
    On,
    /// Never.
    Off,
}

impl ZeroCopyMode {
    /// As the export's option has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            ZeroCopyMode::Auto => "auto",
            ZeroCopyMode::On => "on",
            ZeroCopyMode::Off => "off",
        }
    }
}

/// Put a new overlay on top of a chain that is in use.
///
/// From when the command returns, new data goes to OVERLAY; what was the active layer is its
/// backing file and is not written any more. Who uses the device notices nothing. The result on
/// stdout is the overlay's node-name.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    allow_missing_positional = true,
    after_help = "\
Examples:
  liveblk snapshot monday.qcow2
  liveblk snapshot --name vm1 --node disk0 --overlay-node monday monday.qcow2
  liveblk snapshot --existing prepared.qcow2"
)]
pub(super) struct SnapshotArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// What to put it on: a device path, the id of an export, or the node-name of an active layer;
    /// needed if more than one node is exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// The image to create; it must not exist yet
    #[arg(value_name = "OVERLAY")]
    pub(super) overlay: PathBuf,

    /// Node-name of the overlay; made from its file name if not given
    #[arg(long, value_name = "NODE-NAME")]
    pub(super) overlay_node: Option<String>,

    /// Use the image OVERLAY as it is instead of creating it
    #[arg(long)]
    pub(super) existing: bool,
}

/// Show the chains of an instance, the active layer first.
///
/// A job that works on a chain is a line above the highest layer that it works on, with an arrow that
/// says where the data goes: up (stream), down (commit) or aside (mirror).
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk chain
  liveblk chain --name vm1 --output json
  liveblk chain /dev/ublkb0"
)]
pub(super) struct ChainArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// Where to start: device paths, ids of exports or node-names; if none is given, every exported
    /// node, or else every node that nothing uses as its backing file
    #[arg(value_name = "TARGET")]
    pub(super) targets: Vec<String>,

    /// How to write it
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,
}

/// Run a QMP command and show its result as JSON.
///
/// Arguments are key=value words in the notation of the daemon's own options (dotted keys for
/// members of members, numbers in lists), or one JSON object.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk qmp query-block-exports
  liveblk qmp block_resize node-name=disk0 size=2147483648
  liveblk qmp blockdev-add driver=qcow2 node-name=n read-only=on file.driver=file file.filename=n.qcow2
  liveblk qmp blockdev-del '{\"node-name\": \"n\"}'
  liveblk qmp --name vm1 quit"
)]
pub(super) struct QmpArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,

    /// The command
    #[arg(value_name = "COMMAND")]
    pub(super) command: String,

    /// Its arguments: key=value words, or one JSON object
    #[arg(value_name = "KEY=VALUE")]
    pub(super) arguments: Vec<String>,
}

/// Tell which export a block device is, as INSTANCE/ID.
///
/// Asks every instance that has a socket in the directory of control sockets. This is what the udev
/// rule calls to make the link /dev/liveblk/INSTANCE/ID.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk device-name /dev/ublkb0"
)]
pub(super) struct DeviceNameArguments {
    /// Path of the device
    #[arg(value_name = "DEVICE")]
    pub(super) device: String,
}

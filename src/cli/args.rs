//! What may stand on the command line. The help texts are the manual page's text too.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

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
    Snapshot(SnapshotArguments),
    Chain(ChainArguments),
    Qmp(QmpArguments),
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

/// How a result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// Text for people.
    Human,
    /// JSON for programs.
    Json,
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

//! Arguments of `liveblk backup` and `checkpoint`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::args::Output;
use super::format::Format;
use super::job_args::ChainJobArguments;

/// Where a backup goes, and how.
#[derive(Args, Debug)]
pub(super) struct BackupFile {
    /// The backup that FILE is put on: it has what came after that one
    #[arg(long, value_name = "BACKUP")]
    pub(super) onto: Option<PathBuf>,

    /// Format of FILE; what its extension says if not given
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,

    /// Store data compressed, in qcow2
    #[arg(long)]
    pub(super) compress: bool,

    /// Give the backup up rather than let a write to the device wait so long for it; without, writes wait
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) break_after: Option<u32>,
}

/// Save what a device holds at this moment in a file, while it is used.
///
/// FILE is made, and has when the job has ended what the device held when it began. With --bitmap a
/// dirty bitmap of that name records what changes from then on (it is added if it is not there, and is
/// kept with the image). With --onto as well, FILE has only what changed since the backup that it is put
/// on, which is its backing file: the last one by that bitmap. A backup that fails leaves the bitmap as
/// it was, and its file is of no use.
///
/// The result on stdout is the job's id. Its end can be waited for with --wait or with `liveblk job
/// wait`; Ctrl-C ends the waiting (exit status 130), never the job. A job that has failed or was
/// cancelled is exit status 1.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk backup --wait /backup/disk.qcow2
  liveblk backup --wait --bitmap daily /backup/sunday.qcow2
  liveblk backup --wait --bitmap daily --onto /backup/sunday.qcow2 /backup/monday.qcow2
  liveblk backup --name vm1 --compress --break-after 10 --speed 200M /nfs/vm1.qcow2
  liveblk backup verify /backup/monday.qcow2 nbd+unix:///monday?socket=/run/monday.nbd",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(super) struct BackupArguments {
    #[command(subcommand)]
    pub(super) command: Option<BackupCommand>,

    #[command(flatten)]
    pub(super) job: ChainJobArguments,

    /// File of the backup; it must not exist yet (a file of the name verify is ./verify)
    #[arg(value_name = "FILE", required = true)]
    pub(super) file: Option<PathBuf>,

    /// What is backed up: a device path, the id of an export, or a node-name; needed if more than one
    /// node is exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// The dirty bitmap that tells what changes from this backup to the next
    #[arg(short, long, value_name = "BITMAP")]
    pub(super) bitmap: Option<String>,

    #[command(flatten)]
    pub(super) how: BackupFile,
}

/// What is done with a backup that is there.
#[derive(Debug, Subcommand)]
pub(super) enum BackupCommand {
    Verify(VerifyArguments),
}

/// Compare a backup with the moment that it was made of, byte by byte and by checksum.
///
/// BACKUP is an image with all the backing files that it names: a chain of increments is read as a whole.
/// MOMENT is what it is to hold: another image, or an export of an NBD server, such as that of `liveblk
/// checkpoint --fleece`, as URI. Both are read to their end, and nothing is written. An image that is being
/// written is refused: it is no moment.
///
/// The digest is the SHA-256 of the SHA-256s of each MiB of the disk, the last one as short as it is, and
/// does not depend on the format. Without MOMENT it is only told, or compared with --digest: one that was
/// taken before. Differences are told as ranges of bytes, the first twenty.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Exit status: 0 identical (or nothing to compare with), 1 it could not be found out, 3 different.

Examples:
  liveblk backup verify /backup/monday.qcow2 nbd+unix:///monday?socket=/run/monday.nbd
  liveblk backup verify --output json /backup/monday.qcow2
  liveblk backup verify --digest 5d1c… /backup/monday.qcow2"
)]
pub(super) struct VerifyArguments {
    /// The backup: an image, or an NBD URI
    #[arg(value_name = "BACKUP")]
    pub(super) backup: String,

    /// What it is to hold: an image, or an NBD URI
    #[arg(value_name = "MOMENT")]
    pub(super) moment: Option<String>,

    /// Format of BACKUP; what its extension says if not given, raw for a URI
    #[arg(short, long, value_enum)]
    pub(super) format: Option<Format>,

    /// Format of MOMENT; as with --format
    #[arg(long, value_enum, requires = "moment")]
    pub(super) moment_format: Option<Format>,

    /// The digest that BACKUP is to have
    #[arg(long, value_name = "DIGEST", value_parser = digest)]
    pub(super) digest: Option<String>,

    /// How to write the result
    #[arg(long, value_enum, default_value = "human")]
    pub(super) output: Output,
}

/// 64 hexadecimal digits, in lower case.
fn digest(text: &str) -> Result<String, String> {
    let is_digest = text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    match is_digest {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("a digest has 64 hexadecimal digits".to_owned()),
    }
}

/// Begin to record changes at this moment, and save or show what the device holds at the same moment.
///
/// A dirty bitmap CHECKPOINT is added, which is kept with the image and records from now on. With
/// --since the bitmap of an earlier checkpoint stops to record at the same moment: it says from then on
/// what changed between the two. All of it happens at one moment, or nothing.
///
/// FILE is a backup of that moment: all that the device holds or, with --since and --onto, what has changed
/// since that checkpoint, on top of its backup. The result on stdout is the job's id; see `liveblk backup`.
/// If it fails the bitmaps stay as they are, and it can be made again from --since.
///
/// With --fleece the moment is shown as the read-only NBD export CHECKPOINT instead, until --release. FILE is
/// space for what the device changes meanwhile; it is removed at the end. With --since the export also tells
/// what changed since that checkpoint, as the metadata context qemu:dirty-bitmap:CHECKPOINT. The result on
/// stdout is the export's name.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  liveblk checkpoint --wait sunday /backup/sunday.qcow2
  liveblk checkpoint --wait --since sunday --onto /backup/sunday.qcow2 monday /backup/monday.qcow2
  liveblk checkpoint --since monday --fleece --nbd /run/tuesday.nbd tuesday /var/tmp/tuesday.qcow2
  liveblk checkpoint --release tuesday"
)]
pub(super) struct CheckpointArguments {
    #[command(flatten)]
    pub(super) job: ChainJobArguments,

    /// Name of the checkpoint and of its bitmap
    #[arg(value_name = "CHECKPOINT")]
    pub(super) checkpoint: String,

    /// File of the backup, or for --fleece; it must not exist yet
    #[arg(value_name = "FILE", required_unless_present = "release")]
    pub(super) file: Option<PathBuf>,

    /// What is meant: a device path, the id of an export, or a node-name; needed if more than one node is
    /// exported
    #[arg(value_name = "TARGET")]
    pub(super) target: Option<String>,

    /// An earlier checkpoint
    #[arg(long, value_name = "CHECKPOINT")]
    pub(super) since: Option<String>,

    #[command(flatten)]
    pub(super) how: BackupFile,

    /// Show the moment over NBD instead of saving it
    #[arg(long, conflicts_with_all = ["wait", "onto", "compress", "format"])]
    pub(super) fleece: bool,

    /// Start the instance's NBD server on this UNIX socket
    #[arg(long, value_name = "SOCKET", requires = "fleece")]
    pub(super) nbd: Option<PathBuf>,

    /// End what --fleece has begun; the bitmaps stay
    #[arg(long, conflicts_with_all = ["file", "fleece", "since", "wait", "onto", "compress"])]
    pub(super) release: bool,
}

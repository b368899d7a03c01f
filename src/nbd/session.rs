//! What the handshake is about: the exports there are, and what was agreed on.

use super::meta_context::SelectedContext;
use super::protocol::{ReplyMode, TransmissionFlags};

/// The exports a client can choose from, at the moment it asks.
pub trait Catalog {
    /// Names and descriptions of all exports.
    fn list(&self) -> Vec<(String, Option<String>)>;

    /// The export of that name.
    fn find(&self, name: &str) -> Option<ExportInfo>;
}

/// What the handshake tells about an export.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Description for people.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether several connections see each other's flushes.
    pub multi_conn: bool,
    /// Block sizes told to the client.
    pub block_sizes: BlockSizes,
    /// Full names of the metadata contexts it offers.
    pub contexts: Vec<String>,
}

/// Block size constraints of an export, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this.
    pub minimum: u32,
    /// Alignment at which requests cost least.
    pub preferred: u32,
}

/// What both sides agreed on: the parameters of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Name of the chosen export.
    pub export: String,
    /// Size in bytes that the client was told.
    pub size: u64,
    /// Abilities that the client was told.
    pub flags: TransmissionFlags,
    /// Shape of requests and replies.
    pub mode: ReplyMode,
    /// Contexts selected for `NBD_CMD_BLOCK_STATUS`; empty if the client must not send it.
    pub contexts: Vec<SelectedContext>,
}

impl ExportInfo {
    /// Whether all of these are what they were when they were selected: another export may have come under the name.
    pub(super) fn offers(&self, selected: &[SelectedContext]) -> bool {
        let offered = |context: &SelectedContext| self.contexts.get(context.id as usize);
        selected
            .iter()
            .all(|context| offered(context) == Some(&context.name))
    }

    /// What a client is told that the export can do.
    pub(super) fn transmission_flags(&self, mode: ReplyMode) -> TransmissionFlags {
        use TransmissionFlags as F;
        let mut flags = F::HAS_FLAGS | F::SEND_FLUSH | F::SEND_FUA | F::SEND_CACHE;
        flags |= if self.read_only {
            F::READ_ONLY
        } else {
            F::SEND_TRIM | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO
        };
        flags.set(F::CAN_MULTI_CONN, self.multi_conn);
        flags.set(F::SEND_DF, mode >= ReplyMode::Structured);
        flags.set(F::BLOCK_STATUS_PAYLOAD, mode == ReplyMode::Extended);
        flags
    }
}

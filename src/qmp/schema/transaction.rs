//! Several changes at one moment.

use super::{
    Command, EMPTY, EMPTY_RESULT, Enum, Object, Type, Variants,
    bitmap::{ADD, BITMAP, MERGE},
    cmd,
    job::{BACKUP, DRIVE_BACKUP},
    opt, req,
    snapshot::{INTERNAL, SNAPSHOT, SNAPSHOT_SYNC},
};

pub(super) static COMMANDS: &[Command] = &[cmd("transaction", &TRANSACTION, EMPTY_RESULT)];

static TRANSACTION: Object = Object::new(
    "transaction-arg",
    &[
        req("actions", Type::Array(&Type::Object(&ACTION))),
        opt("properties", Type::Object(&PROPERTIES)),
    ],
);

static ACTION: Object = Object {
    name: "TransactionAction",
    base: None,
    members: &[req("type", Type::Enum(&KIND))],
    variants: Some(Variants {
        tag: "type",
        branches: &[
            ("abort", &ABORT),
            ("block-dirty-bitmap-add", &ADD_BITMAP),
            ("block-dirty-bitmap-clear", &NAMED_BITMAP),
            ("block-dirty-bitmap-disable", &NAMED_BITMAP),
            ("block-dirty-bitmap-enable", &NAMED_BITMAP),
            ("block-dirty-bitmap-merge", &MERGE_BITMAPS),
            ("block-dirty-bitmap-remove", &NAMED_BITMAP),
            ("blockdev-backup", &COPY),
            ("blockdev-snapshot", &ATTACH),
            ("blockdev-snapshot-internal-sync", &CREATE_INTERNAL),
            ("blockdev-snapshot-sync", &CREATE),
            ("drive-backup", &COPY_TO_FILE),
        ],
    }),
};

static KIND: Enum = Enum {
    name: "TransactionActionKind",
    values: &[
        "abort",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "blockdev-backup",
        "blockdev-snapshot",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
    ],
};

static ABORT: Object = Object::new("AbortWrapper", &[req("data", Type::Object(&EMPTY))]);
static ADD_BITMAP: Object = Object::new(
    "BlockDirtyBitmapAddWrapper",
    &[req("data", Type::Object(&ADD))],
);
static NAMED_BITMAP: Object = Object::new(
    "BlockDirtyBitmapWrapper",
    &[req("data", Type::Object(&BITMAP))],
);
static MERGE_BITMAPS: Object = Object::new(
    "BlockDirtyBitmapMergeWrapper",
    &[req("data", Type::Object(&MERGE))],
);
static ATTACH: Object = Object::new("SnapshotWrapper", &[req("data", Type::Object(&SNAPSHOT))]);
static CREATE: Object = Object::new(
    "SnapshotSyncWrapper",
    &[req("data", Type::Object(&SNAPSHOT_SYNC))],
);
static CREATE_INTERNAL: Object = Object::new(
    "BlockdevSnapshotInternalWrapper",
    &[req("data", Type::Object(&INTERNAL))],
);

static COPY: Object = Object::new(
    "BlockdevBackupWrapper",
    &[req("data", Type::Object(&BACKUP))],
);
static COPY_TO_FILE: Object = Object::new(
    "DriveBackupWrapper",
    &[req("data", Type::Object(&DRIVE_BACKUP))],
);

static PROPERTIES: Object = Object::new(
    "TransactionProperties",
    &[opt("completion-mode", Type::Enum(&COMPLETION_MODE))],
);

static COMPLETION_MODE: Enum = Enum {
    name: "ActionCompletionMode",
    values: &["individual", "grouped"],
};

//! Putting a new overlay on top.

use super::{
    BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Object, STR, Type, U32, Variants, cmd, opt, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-snapshot-sync", &SNAPSHOT_SYNC, EMPTY_RESULT),
    Command {
        features: &["allow-write-only-overlay"],
        ..cmd("blockdev-snapshot", &SNAPSHOT, EMPTY_RESULT)
    },
    Command {
        planned: true,
        ..cmd("transaction", &TRANSACTION_ARGS, EMPTY_RESULT)
    },
    Command {
        planned: true,
        ..cmd("block-dirty-bitmap-add", &BITMAP_ADD, EMPTY_RESULT)
    },
];

static SNAPSHOT_SYNC: Object = Object::new(
    "BlockdevSnapshotSync",
    &[
        opt("device", STR),
        opt("node-name", STR),
        req("snapshot-file", STR),
        opt("snapshot-node-name", STR),
        opt("format", STR),
        opt("mode", Type::Enum(&NEW_IMAGE_MODE)),
    ],
);

static NEW_IMAGE_MODE: Enum = Enum {
    name: "NewImageMode",
    values: &["existing", "absolute-paths"],
};

static SNAPSHOT: Object = Object::new("BlockdevSnapshot", &[req("node", STR), req("overlay", STR)]);

static TRANSACTION_ARGS: Object = Object::new(
    "transaction-arg",
    &[
        req("actions", Type::Array(&Type::Object(&ACTION))),
        opt("properties", Type::Object(&TRANSACTION_PROPERTIES)),
    ],
);

static TRANSACTION_PROPERTIES: Object = Object::new(
    "TransactionProperties",
    &[opt("completion-mode", Type::Enum(&COMPLETION_MODE))],
);

static COMPLETION_MODE: Enum = Enum {
    name: "ActionCompletionMode",
    values: &["individual", "grouped"],
};

static ACTION: Object = Object {
    name: "TransactionAction",
    base: None,
    members: &[req("type", Type::Enum(&ACTION_KIND))],
    variants: Some(Variants {
        tag: "type",
        branches: &[
            ("abort", &ABORT_WRAPPER),
            ("block-dirty-bitmap-add", &BITMAP_ADD_WRAPPER),
            ("blockdev-snapshot", &SNAPSHOT_WRAPPER),
            ("blockdev-snapshot-sync", &SNAPSHOT_SYNC_WRAPPER),
        ],
    }),
};

static ACTION_KIND: Enum = Enum {
    name: "TransactionActionKind",
    values: &[
        "abort",
        "block-dirty-bitmap-add",
        "blockdev-snapshot",
        "blockdev-snapshot-sync",
    ],
};

static ABORT_WRAPPER: Object = Object::new("AbortWrapper", &[req("data", Type::Object(&EMPTY))]);

static BITMAP_ADD_WRAPPER: Object = Object::new(
    "BlockDirtyBitmapAddWrapper",
    &[req("data", Type::Object(&BITMAP_ADD))],
);

static SNAPSHOT_WRAPPER: Object = Object::new(
    "BlockdevSnapshotWrapper",
    &[req("data", Type::Object(&SNAPSHOT))],
);

static SNAPSHOT_SYNC_WRAPPER: Object = Object::new(
    "BlockdevSnapshotSyncWrapper",
    &[req("data", Type::Object(&SNAPSHOT_SYNC))],
);

static BITMAP_ADD: Object = Object::new(
    "BlockDirtyBitmapAdd",
    &[
        req("node", STR),
        req("name", STR),
        opt("granularity", U32),
        opt("persistent", BOOL),
        opt("disabled", BOOL),
    ],
);

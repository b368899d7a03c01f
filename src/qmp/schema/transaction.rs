//! Several changes at one moment.

use super::{
    Command, EMPTY, EMPTY_RESULT, Enum, Object, Type, Variants, cmd, opt, req,
    snapshot::{SNAPSHOT, SNAPSHOT_SYNC},
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
            ("blockdev-snapshot", &ATTACH),
            ("blockdev-snapshot-sync", &CREATE),
        ],
    }),
};

static KIND: Enum = Enum {
    name: "TransactionActionKind",
    values: &["abort", "blockdev-snapshot", "blockdev-snapshot-sync"],
};

static ABORT: Object = Object::new("AbortWrapper", &[req("data", Type::Object(&EMPTY))]);
static ATTACH: Object = Object::new("SnapshotWrapper", &[req("data", Type::Object(&SNAPSHOT))]);
static CREATE: Object = Object::new(
    "SnapshotSyncWrapper",
    &[req("data", Type::Object(&SNAPSHOT_SYNC))],
);

static PROPERTIES: Object = Object::new(
    "TransactionProperties",
    &[opt("completion-mode", Type::Enum(&COMPLETION_MODE))],
);

static COMPLETION_MODE: Enum = Enum {
    name: "ActionCompletionMode",
    values: &["individual", "grouped"],
};

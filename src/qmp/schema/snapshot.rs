//! Putting a new overlay on top.

use super::{Command, EMPTY_RESULT, Enum, Object, STR, Type, cmd, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-snapshot-sync", &SNAPSHOT_SYNC, EMPTY_RESULT),
    Command {
        features: &["allow-write-only-overlay"],
        ..cmd("blockdev-snapshot", &SNAPSHOT, EMPTY_RESULT)
    },
    cmd("change-backing-file", &CHANGE_BACKING, EMPTY_RESULT),
];

pub(super) static SNAPSHOT_SYNC: Object = Object::new(
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

pub(super) static NEW_IMAGE_MODE: Enum = Enum {
    name: "NewImageMode",
    values: &["existing", "absolute-paths"],
};

pub(super) static SNAPSHOT: Object =
    Object::new("BlockdevSnapshot", &[req("node", STR), req("overlay", STR)]);

static CHANGE_BACKING: Object = Object::new(
    "change-backing-file-arg",
    &[
        req("device", STR),
        req("image-node-name", STR),
        req("backing-file", STR),
    ],
);

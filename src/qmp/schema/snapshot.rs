//! Putting a new overlay on top, and snapshots within an image.

use super::{Command, EMPTY_RESULT, Enum, INT, Object, STR, Type, cmd, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-snapshot-sync", &SNAPSHOT_SYNC, EMPTY_RESULT),
    Command {
        features: &["allow-write-only-overlay"],
        ..cmd("blockdev-snapshot", &SNAPSHOT, EMPTY_RESULT)
    },
    cmd("change-backing-file", &CHANGE_BACKING, EMPTY_RESULT),
    cmd("blockdev-snapshot-internal-sync", &INTERNAL, EMPTY_RESULT),
    cmd(
        "blockdev-snapshot-delete-internal-sync",
        &DELETE_INTERNAL,
        Type::Object(&SNAPSHOT_INFO),
    ),
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

pub(super) static INTERNAL: Object = Object::new(
    "BlockdevSnapshotInternal",
    &[req("device", STR), req("name", STR)],
);

static DELETE_INTERNAL: Object = Object::new(
    "blockdev-snapshot-delete-internal-sync-arg",
    &[req("device", STR), opt("id", STR), opt("name", STR)],
);

pub(super) static SNAPSHOT_INFO: Object = Object::new(
    "SnapshotInfo",
    &[
        req("id", STR),
        req("name", STR),
        req("vm-state-size", INT),
        req("date-sec", INT),
        req("date-nsec", INT),
        req("vm-clock-sec", INT),
        req("vm-clock-nsec", INT),
        opt("icount", INT),
    ],
);

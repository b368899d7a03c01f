//! Jobs.

use super::{
    BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Event, INT, Int, Member, Object, SIZE, STR, Type,
    U32, Variants, cmd, filter, node, opt, refused, req, snapshot,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-create", &CREATE_ARGS, EMPTY_RESULT),
    cmd("blockdev-backup", &BACKUP, EMPTY_RESULT),
    cmd("drive-backup", &DRIVE_BACKUP, EMPTY_RESULT),
    cmd("block-stream", &STREAM_ARGS, EMPTY_RESULT),
    cmd("block-commit", &COMMIT_ARGS, EMPTY_RESULT),
    cmd("drive-mirror", &DRIVE_MIRROR, EMPTY_RESULT),
    cmd("blockdev-mirror", &BLOCKDEV_MIRROR_ARGS, EMPTY_RESULT),
    cmd("block-job-set-speed", &SET_SPEED_ARGS, EMPTY_RESULT),
    cmd("block-job-cancel", &BLOCK_JOB_CANCEL_ARGS, EMPTY_RESULT),
    cmd("block-job-pause", &DEVICE_ARGS, EMPTY_RESULT),
    cmd("block-job-resume", &DEVICE_ARGS, EMPTY_RESULT),
    cmd("block-job-complete", &DEVICE_ARGS, EMPTY_RESULT),
    cmd("block-job-finalize", &ID_ARGS, EMPTY_RESULT),
    cmd("block-job-dismiss", &ID_ARGS, EMPTY_RESULT),
    cmd("block-job-change", &CHANGE_ARGS, EMPTY_RESULT),
    cmd("job-cancel", &ID_ARGS, EMPTY_RESULT),
    cmd("job-pause", &ID_ARGS, EMPTY_RESULT),
    cmd("job-resume", &ID_ARGS, EMPTY_RESULT),
    cmd("job-complete", &ID_ARGS, EMPTY_RESULT),
    cmd("job-finalize", &ID_ARGS, EMPTY_RESULT),
    cmd("job-dismiss", &ID_ARGS, EMPTY_RESULT),
    cmd("query-jobs", &EMPTY, Type::Array(&Type::Object(&JOB_INFO))),
    cmd(
        "query-block-jobs",
        &EMPTY,
        Type::Array(&Type::Object(&BLOCK_JOB_INFO)),
    ),
];

pub(super) static EVENTS: &[Event] = &[
    event("JOB_STATUS_CHANGE", &STATUS_CHANGE),
    event("BLOCK_JOB_READY", &JOB_REPORT),
    event("BLOCK_JOB_CANCELLED", &JOB_REPORT),
    event("BLOCK_JOB_COMPLETED", &JOB_COMPLETED),
    event("BLOCK_JOB_PENDING", &JOB_PENDING),
    event("BLOCK_JOB_ERROR", &JOB_ERROR),
];

const fn event(name: &'static str, data: &'static Object) -> Event {
    Event { name, data }
}

static JOB_REPORT_MEMBERS: &[Member] = &[
    req("type", Type::Enum(&JOB_TYPE)),
    req("device", STR),
    req("len", INT),
    req("offset", INT),
    req("speed", INT),
];

static JOB_REPORT: Object = Object::new("BLOCK_JOB_READY-arg", JOB_REPORT_MEMBERS);

static JOB_COMPLETED: Object =
    Object::new("BLOCK_JOB_COMPLETED-arg", &[opt("error", STR)]).based(&JOB_REPORT);

static JOB_PENDING: Object = Object::new(
    "BLOCK_JOB_PENDING-arg",
    &[req("type", Type::Enum(&JOB_TYPE)), req("id", STR)],
);

static JOB_ERROR: Object = Object::new(
    "BLOCK_JOB_ERROR-arg",
    &[
        req("device", STR),
        req("operation", Type::Enum(&OPERATION)),
        req("action", Type::Enum(&ERROR_ACTION)),
    ],
);

pub(super) static OPERATION: Enum = Enum {
    name: "IoOperationType",
    values: &["read", "write"],
};

pub(super) static ERROR_ACTION: Enum = Enum {
    name: "BlockErrorAction",
    values: &["ignore", "report", "stop"],
};

static ON_ERROR: Enum = Enum {
    name: "BlockdevOnError",
    values: &["report", "ignore", "enospc", "stop", "auto"],
};

static STREAM_ARGS: Object = Object::new(
    "block-stream-arg",
    &[
        opt("job-id", STR),
        req("device", STR),
        opt("base", STR),
        opt("base-node", STR),
        opt("backing-file", STR),
        opt("backing-mask-protocol", BOOL),
        opt("bottom", STR),
        opt("speed", INT),
        opt("on-error", Type::Enum(&ON_ERROR)),
        opt("filter-node-name", STR),
        opt("auto-finalize", BOOL),
        opt("auto-dismiss", BOOL),
    ],
);

static COMMIT_ARGS: Object = Object::new(
    "block-commit-arg",
    &[
        opt("job-id", STR),
        req("device", STR),
        opt("base-node", STR),
        opt("base", STR).features(&["deprecated"]),
        opt("top-node", STR),
        opt("top", STR).features(&["deprecated"]),
        opt("backing-file", STR),
        opt("backing-mask-protocol", BOOL),
        opt("speed", INT),
        opt("on-error", Type::Enum(&ON_ERROR)),
        opt("filter-node-name", STR),
        opt("auto-finalize", BOOL),
        opt("auto-dismiss", BOOL),
        opt("copy-mode", Type::Enum(&COPY_MODE)),
    ],
);

static DRIVE_MIRROR: Object = Object::new(
    "DriveMirror",
    &[
        opt("job-id", STR),
        req("device", STR),
        req("target", STR),
        opt("format", STR),
        opt("node-name", STR),
        opt("replaces", STR),
        req("sync", Type::Enum(&SYNC_MODE)),
        opt("mode", Type::Enum(&snapshot::NEW_IMAGE_MODE)),
        opt("speed", INT),
        opt("granularity", Type::Int(Int::U32)),
        opt("buf-size", INT),
        opt("on-source-error", Type::Enum(&ON_ERROR)),
        opt("on-target-error", Type::Enum(&ON_ERROR)),
        opt("unmap", BOOL),
        opt("copy-mode", Type::Enum(&COPY_MODE)),
        opt("auto-finalize", BOOL),
        opt("auto-dismiss", BOOL),
    ],
);

static BLOCKDEV_MIRROR_ARGS: Object = Object::new(
    "blockdev-mirror-arg",
    &[
        opt("job-id", STR),
        req("device", STR),
        req("target", STR),
        opt("replaces", STR),
        req("sync", Type::Enum(&SYNC_MODE)),
        opt("speed", INT),
        opt("granularity", Type::Int(Int::U32)),
        opt("buf-size", INT),
        opt("on-source-error", Type::Enum(&ON_ERROR)),
        opt("on-target-error", Type::Enum(&ON_ERROR)),
        opt("filter-node-name", STR),
        opt("copy-mode", Type::Enum(&COPY_MODE)),
        opt("auto-finalize", BOOL),
        opt("auto-dismiss", BOOL),
        opt("target-is-zero", BOOL),
    ],
);

pub(super) static BACKUP: Object =
    Object::new("BlockdevBackup", &[req("target", STR)]).based(&BACKUP_COMMON);

pub(super) static DRIVE_BACKUP: Object = Object::new(
    "DriveBackup",
    &[
        req("target", STR),
        opt("format", STR),
        opt("mode", Type::Enum(&snapshot::NEW_IMAGE_MODE)),
    ],
)
.based(&BACKUP_COMMON);

static BACKUP_COMMON: Object = Object::new(
    "BackupCommon",
    &[
        opt("job-id", STR),
        req("device", STR),
        req("sync", Type::Enum(&SYNC_MODE)),
        opt("speed", INT),
        opt("bitmap", STR),
        opt("bitmap-mode", Type::Enum(&BITMAP_MODE)),
        opt("compress", BOOL),
        opt("on-source-error", Type::Enum(&ON_ERROR)),
        opt("on-target-error", Type::Enum(&ON_ERROR)),
        opt("on-cbw-error", Type::Enum(&filter::ON_CBW_ERROR)),
        opt("cbw-timeout", U32),
        opt("auto-finalize", BOOL),
        opt("auto-dismiss", BOOL),
        opt("filter-node-name", STR),
        opt("discard-source", BOOL),
        opt("x-perf", Type::Object(&BACKUP_PERF)).features(&["unstable"]),
    ],
);

static BACKUP_PERF: Object = Object::new(
    "BackupPerf",
    &[
        opt("use-copy-range", BOOL),
        opt("max-workers", INT),
        opt("max-chunk", INT),
        opt("min-cluster-size", INT),
    ],
);

static SYNC_MODE: Enum = Enum {
    name: "MirrorSyncMode",
    values: &["top", "full", "none", "incremental", "bitmap"],
};

static BITMAP_MODE: Enum = Enum {
    name: "BitmapSyncMode",
    values: &["on-success", "never", "always"],
};

static DEVICE_ARGS: Object = Object::new("block-job-pause-arg", &[req("device", STR)]);

static ID_ARGS: Object = Object::new("job-pause-arg", &[req("id", STR)]);

static SET_SPEED_ARGS: Object = Object::new(
    "block-job-set-speed-arg",
    &[req("device", STR), req("speed", INT)],
);

static BLOCK_JOB_CANCEL_ARGS: Object = Object::new(
    "block-job-cancel-arg",
    &[req("device", STR), opt("force", BOOL)],
);

static CHANGE_ARGS: Object = Object {
    name: "BlockJobChangeOptions",
    base: None,
    members: &[req("id", STR), req("type", Type::Enum(&JOB_TYPE))],
    variants: Some(Variants {
        tag: "type",
        branches: &[("mirror", &CHANGE_MIRROR), ("commit", &CHANGE_COMMIT)],
    }),
};

static CHANGE_MIRROR: Object = Object::new(
    "BlockJobChangeOptionsMirror",
    &[req("copy-mode", Type::Enum(&COPY_MODE))],
);

/// Ours alone: QEMU changes no commit.
static CHANGE_COMMIT: Object = Object::new(
    "BlockJobChangeOptionsCommit",
    &[opt("copy-mode", Type::Enum(&COPY_MODE))],
);

static COPY_MODE: Enum = Enum {
    name: "MirrorCopyMode",
    values: &["background", "write-blocking"],
};

static STATUS_CHANGE: Object = Object::new(
    "JOB_STATUS_CHANGE-arg",
    &[req("id", STR), req("status", Type::Enum(&JOB_STATUS))],
);

static CREATE_ARGS: Object = Object::new(
    "blockdev-create-arg",
    &[
        req("job-id", STR),
        req("options", Type::Object(&CREATE_OPTIONS)),
    ],
);

static CREATE_OPTIONS: Object = Object {
    name: "BlockdevCreateOptions",
    base: None,
    members: &[req("driver", Type::Enum(&node::DRIVER))],
    variants: Some(Variants {
        tag: "driver",
        branches: &[("file", &CREATE_FILE), ("qcow2", &CREATE_QCOW2)],
    }),
};

static CREATE_FILE: Object = Object::new(
    "BlockdevCreateOptionsFile",
    &[
        req("filename", STR),
        req("size", SIZE),
        refused("preallocation", "files are made sparse"),
        refused("nocow", "copy-on-write of the file system is left alone"),
        refused(
            "extent-size-hint",
            "extents of the file system are left alone",
        ),
    ],
);

static CREATE_QCOW2: Object = Object::new(
    "BlockdevCreateOptionsQcow2",
    &[
        req("file", Type::Alternate(&node::BLOCKDEV_REF)),
        refused("data-file", "external data files cannot be opened"),
        refused("data-file-raw", "external data files cannot be opened"),
        refused("extended-l2", "images with subclusters cannot be opened"),
        req("size", SIZE),
        opt("version", Type::Enum(&QCOW2_VERSION)),
        opt("backing-file", STR),
        opt("backing-fmt", Type::Enum(&node::DRIVER)),
        refused("encrypt", "encrypted images cannot be opened"),
        opt("cluster-size", SIZE),
        opt("preallocation", Type::Enum(&PREALLOCATION)),
        opt("lazy-refcounts", BOOL),
        opt("refcount-bits", INT),
        opt("compression-type", Type::Enum(&COMPRESSION)),
    ],
);

static QCOW2_VERSION: Enum = Enum {
    name: "BlockdevQcow2Version",
    values: &["v2", "v3"],
};

static PREALLOCATION: Enum = Enum {
    name: "PreallocMode",
    values: &["off", "metadata"],
};

static COMPRESSION: Enum = Enum {
    name: "Qcow2CompressionType",
    values: &["zlib", "zstd"],
};

static JOB_TYPE: Enum = Enum {
    name: "JobType",
    values: &[
        "commit",
        "stream",
        "mirror",
        "backup",
        "create",
        "amend",
        "snapshot-load",
        "snapshot-save",
        "snapshot-delete",
    ],
};

static JOB_STATUS: Enum = Enum {
    name: "JobStatus",
    values: &[
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ],
};

static IO_STATUS: Enum = Enum {
    name: "BlockDeviceIoStatus",
    values: &["ok", "failed", "nospace"],
};

static JOB_INFO: Object = Object::new(
    "JobInfo",
    &[
        req("id", STR),
        req("type", Type::Enum(&JOB_TYPE)),
        req("status", Type::Enum(&JOB_STATUS)),
        req("current-progress", INT),
        req("total-progress", INT),
        opt("error", STR),
    ],
);

static BLOCK_JOB_INFO: Object = Object {
    name: "BlockJobInfo",
    base: None,
    members: &[
        req("type", Type::Enum(&JOB_TYPE)),
        req("device", STR),
        req("len", INT),
        req("offset", INT),
        req("busy", BOOL),
        req("paused", BOOL),
        req("speed", INT),
        req("io-status", Type::Enum(&IO_STATUS)),
        req("ready", BOOL),
        req("status", Type::Enum(&JOB_STATUS)),
        req("auto-finalize", BOOL),
        req("auto-dismiss", BOOL),
        opt("error", STR),
    ],
    variants: Some(Variants {
        tag: "type",
        branches: &[("mirror", &BLOCK_JOB_INFO_MIRROR)],
    }),
};

static BLOCK_JOB_INFO_MIRROR: Object =
    Object::new("BlockJobInfoMirror", &[req("actively-synced", BOOL)]);

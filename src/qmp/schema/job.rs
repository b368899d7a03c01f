//! Jobs.

use super::{
    BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Event, INT, Object, SIZE, STR, Type, Variants, cmd,
    node, opt, refused, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-create", &CREATE_ARGS, EMPTY_RESULT),
    cmd("job-dismiss", &DISMISS_ARGS, EMPTY_RESULT),
    cmd("query-jobs", &EMPTY, Type::Array(&Type::Object(&JOB_INFO))),
    cmd(
        "query-block-jobs",
        &EMPTY,
        Type::Array(&Type::Object(&BLOCK_JOB_INFO)),
    ),
];

pub(super) static EVENTS: &[Event] = &[Event {
    name: "JOB_STATUS_CHANGE",
    data: &STATUS_CHANGE,
}];

static STATUS_CHANGE: Object = Object::new(
    "JOB_STATUS_CHANGE-arg",
    &[req("id", STR), req("status", Type::Enum(&JOB_STATUS))],
);

static DISMISS_ARGS: Object = Object::new("job-dismiss-arg", &[req("id", STR)]);

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
    values: &["create"],
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

static BLOCK_JOB_INFO: Object = Object::new(
    "BlockJobInfo",
    &[
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
);

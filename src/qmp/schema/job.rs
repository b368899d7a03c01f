//! Jobs.

use super::{BOOL, Command, EMPTY, Enum, Event, INT, Object, STR, Type, cmd, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd("query-jobs", &EMPTY, Type::Array(&Type::Object(&JOB_INFO))),
    cmd(
        "query-block-jobs",
        &EMPTY,
        Type::Array(&Type::Object(&BLOCK_JOB_INFO)),
    ),
];

pub(super) static EVENTS: &[Event] = &[];

static JOB_TYPE: Enum = Enum {
    name: "JobType",
    values: &["commit", "stream", "mirror", "backup", "create"],
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

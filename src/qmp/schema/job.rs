//! Jobs.

use super::{
    BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Event, INT, Object, STR, Type, cmd, opt, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("query-jobs", &EMPTY, Type::Array(&Type::Object(&JOB_INFO))),
    cmd(
        "query-block-jobs",
        &EMPTY,
        Type::Array(&Type::Object(&BLOCK_JOB_INFO)),
    ),
    Command {
        planned: true,
        ..cmd("block-stream", &STREAM_ARGS, EMPTY_RESULT)
    },
    Command {
        planned: true,
        ..cmd("block-job-set-speed", &SET_SPEED_ARGS, EMPTY_RESULT)
    },
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

static ON_ERROR: Enum = Enum {
    name: "BlockdevOnError",
    values: &["report", "ignore", "enospc", "stop", "auto"],
};

static SET_SPEED_ARGS: Object = Object::new(
    "block-job-set-speed-arg",
    &[req("device", STR), req("speed", INT)],
);

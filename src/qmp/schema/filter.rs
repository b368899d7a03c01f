//! Options of filters, and the limits of throttle groups.

use crate::block::DEBUG_EVENTS;

use super::node::{BLOCKDEV_REF, FORMAT_OPTIONS};
use super::{BOOL, Enum, INT, Member, Object, SIZE, STR, Type, U32, opt, refused, req};

pub(super) static COPY_ON_READ_OPTIONS: Object =
    Object::new("BlockdevOptionsCor", &[opt("bottom", STR)]).based(&FORMAT_OPTIONS);

pub(super) static COPY_BEFORE_WRITE_OPTIONS: Object = Object::new(
    "BlockdevOptionsCbw",
    &[
        req("target", Type::Alternate(&BLOCKDEV_REF)),
        refused("bitmap", "a snapshot has all of its disk"),
        opt("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        opt("cbw-timeout", U32),
        opt("min-cluster-size", SIZE),
    ],
)
.based(&FORMAT_OPTIONS);

pub(super) static ON_CBW_ERROR: Enum = Enum {
    name: "OnCbwError",
    values: &["break-guest-write", "break-snapshot"],
};

pub(super) static SNAPSHOT_ACCESS_OPTIONS: Object =
    Object::new("BlockdevOptionsSnapshotAccess", &[]).based(&FORMAT_OPTIONS);

pub(super) static PREALLOCATE_OPTIONS: Object = Object::new(
    "BlockdevOptionsPreallocate",
    &[opt("prealloc-align", INT), opt("prealloc-size", INT)],
)
.based(&FORMAT_OPTIONS);

pub(super) static THROTTLE_OPTIONS: Object = Object::new(
    "BlockdevOptionsThrottle",
    &[
        req("throttle-group", STR),
        req("file", Type::Alternate(&BLOCKDEV_REF)),
    ],
);

pub(super) static BLKDEBUG_OPTIONS: Object = Object::new(
    "BlockdevOptionsBlkdebug",
    &[
        req("image", Type::Alternate(&BLOCKDEV_REF)),
        opt("config", STR),
        opt("align", INT),
        opt("max-transfer", INT),
        opt("opt-write-zero", INT),
        opt("max-write-zero", INT),
        opt("opt-discard", INT),
        opt("max-discard", INT),
        opt("inject-error", Type::Array(&Type::Object(&INJECT_ERROR))),
        opt("set-state", Type::Array(&Type::Object(&SET_STATE))),
        opt(
            "take-child-perms",
            Type::Array(&Type::Enum(&super::node_info::PERMISSION)),
        ),
        opt(
            "unshare-child-perms",
            Type::Array(&Type::Enum(&super::node_info::PERMISSION)),
        ),
    ],
);

static INJECT_ERROR: Object = Object::new(
    "BlkdebugInjectErrorOptions",
    &[
        req("event", Type::Enum(&EVENT)),
        opt("state", INT),
        opt("iotype", Type::Enum(&IO_TYPE)),
        opt("errno", INT),
        opt("sector", INT),
        opt("once", BOOL),
        opt("immediately", BOOL),
    ],
);

static SET_STATE: Object = Object::new(
    "BlkdebugSetStateOptions",
    &[
        req("event", Type::Enum(&EVENT)),
        opt("state", INT),
        req("new_state", INT),
    ],
);

static IO_TYPE: Enum = Enum {
    name: "BlkdebugIOType",
    values: &[
        "read",
        "write",
        "write-zeroes",
        "discard",
        "flush",
        "block-status",
    ],
};

/// QEMU's; those that do not happen here are refused when a node is opened.
static EVENT: Enum = Enum {
    name: "BlkdebugEvent",
    values: &EVENT_NAMES,
};

static EVENT_NAMES: [&str; DEBUG_EVENTS.len()] = {
    let mut names = [""; DEBUG_EVENTS.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = DEBUG_EVENTS[index].0;
        index += 1;
    }
    names
};

/// The limits of a throttle group as one value.
static THROTTLE_LIMITS: Object = Object::new(
    "ThrottleLimits",
    &[
        opt("iops-total", INT),
        opt("iops-total-max", INT),
        opt("iops-total-max-length", INT),
        opt("iops-read", INT),
        opt("iops-read-max", INT),
        opt("iops-read-max-length", INT),
        opt("iops-write", INT),
        opt("iops-write-max", INT),
        opt("iops-write-max-length", INT),
        opt("bps-total", INT),
        opt("bps-total-max", INT),
        opt("bps-total-max-length", INT),
        opt("bps-read", INT),
        opt("bps-read-max", INT),
        opt("bps-read-max-length", INT),
        opt("bps-write", INT),
        opt("bps-write-max", INT),
        opt("bps-write-max-length", INT),
        opt("iops-size", INT),
    ],
);

/// The argument of setting the property `limits`.
pub static LIMITS_PROPERTY: Object = Object::new(
    "limits-arg",
    &[req("limits", Type::Object(&THROTTLE_LIMITS))],
);

pub(super) static THROTTLE_GROUP_OPTIONS: Object = Object::new(
    "ThrottleGroupProperties",
    &[
        opt("limits", Type::Object(&THROTTLE_LIMITS)),
        unstable("x-iops-total"),
        unstable("x-iops-total-max"),
        unstable("x-iops-total-max-length"),
        unstable("x-iops-read"),
        unstable("x-iops-read-max"),
        unstable("x-iops-read-max-length"),
        unstable("x-iops-write"),
        unstable("x-iops-write-max"),
        unstable("x-iops-write-max-length"),
        unstable("x-bps-total"),
        unstable("x-bps-total-max"),
        unstable("x-bps-total-max-length"),
        unstable("x-bps-read"),
        unstable("x-bps-read-max"),
        unstable("x-bps-read-max-length"),
        unstable("x-bps-write"),
        unstable("x-bps-write-max"),
        unstable("x-bps-write-max-length"),
        unstable("x-iops-size"),
    ],
);

const fn unstable(name: &'static str) -> Member {
    Member {
        features: &["unstable"],
        ..opt(name, INT)
    }
}

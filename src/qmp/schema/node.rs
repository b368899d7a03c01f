//! Describing, adding, changing and removing nodes.

use super::{
    Alternate, BOOL, Command, EMPTY_RESULT, Enum, Event, INT, Object, STR, Type, U32, U64,
    Variants, cmd, export, filter, job, opt, refused, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("blockdev-add", &BLOCKDEV_OPTIONS, EMPTY_RESULT),
    cmd("blockdev-del", &DEL_ARGS, EMPTY_RESULT),
    cmd("blockdev-reopen", &REOPEN_ARGS, EMPTY_RESULT),
];

pub(super) static EVENTS: &[Event] = &[
    Event {
        name: "BLOCK_IMAGE_CORRUPTED",
        data: &IMAGE_CORRUPTED,
    },
    Event {
        name: "BLOCK_IO_ERROR",
        data: &IO_ERROR,
    },
];

static IO_ERROR: Object = Object::new(
    "BLOCK_IO_ERROR-arg",
    &[
        req("qom-path", STR),
        req("device", STR),
        opt("node-name", STR),
        req("operation", Type::Enum(&job::OPERATION)),
        req("action", Type::Enum(&job::ERROR_ACTION)),
        opt("nospace", BOOL),
        req("reason", STR),
    ],
);

/// The description of a node: options of `--blockdev`, arguments of `blockdev-add`.
pub static BLOCKDEV_OPTIONS: Object = Object {
    name: "BlockdevOptions",
    base: None,
    members: &[
        req("driver", Type::Enum(&DRIVER)),
        opt("node-name", STR),
        opt("discard", Type::Enum(&DISCARD)),
        opt("cache", Type::Object(&CACHE_OPTIONS)),
        opt("active", BOOL),
        opt("read-only", BOOL),
        opt("auto-read-only", BOOL),
        opt("force-share", BOOL),
        opt("detect-zeroes", Type::Enum(&DETECT_ZEROES)),
    ],
    variants: Some(Variants {
        tag: "driver",
        branches: &[
            ("blkdebug", &filter::BLKDEBUG_OPTIONS),
            ("copy-before-write", &filter::COPY_BEFORE_WRITE_OPTIONS),
            ("copy-on-read", &filter::COPY_ON_READ_OPTIONS),
            ("file", &FILE_OPTIONS),
            ("host_device", &FILE_OPTIONS),
            ("nbd", &NBD_OPTIONS),
            ("null-aio", &NULL_OPTIONS),
            ("null-co", &NULL_OPTIONS),
            ("preallocate", &filter::PREALLOCATE_OPTIONS),
            ("qcow2", &QCOW2_OPTIONS),
            ("raw", &RAW_OPTIONS),
            ("snapshot-access", &filter::SNAPSHOT_ACCESS_OPTIONS),
            ("throttle", &filter::THROTTLE_OPTIONS),
        ],
    }),
};

/// The drivers that there are.
pub(super) static DRIVER: Enum = Enum {
    name: "BlockdevDriver",
    values: &[
        "blkdebug",
        "copy-before-write",
        "copy-on-read",
        "file",
        "host_device",
        "nbd",
        "null-aio",
        "null-co",
        "preallocate",
        "qcow2",
        "raw",
        "snapshot-access",
        "throttle",
    ],
};

static DEL_ARGS: Object = Object::new("blockdev-del-arg", &[req("node-name", STR)]);

static REOPEN_ARGS: Object = Object::new(
    "blockdev-reopen-arg",
    &[req(
        "options",
        Type::Array(&Type::Object(&BLOCKDEV_OPTIONS)),
    )],
);

static IMAGE_CORRUPTED: Object = Object::new(
    "BLOCK_IMAGE_CORRUPTED-arg",
    &[
        req("device", STR),
        opt("node-name", STR),
        req("msg", STR),
        opt("offset", INT),
        opt("size", INT),
        req("fatal", BOOL),
    ],
);

static DISCARD: Enum = Enum {
    name: "BlockdevDiscardOptions",
    values: &["ignore", "unmap"],
};

pub(super) static DETECT_ZEROES: Enum = Enum {
    name: "BlockdevDetectZeroesOptions",
    values: &["off", "on", "unmap"],
};

static CACHE_OPTIONS: Object = Object::new(
    "BlockdevCacheOptions",
    &[opt("direct", BOOL), opt("no-flush", BOOL)],
);

/// A child: a description in place, or the name of a node.
pub(super) static BLOCKDEV_REF: Alternate = Alternate {
    name: "BlockdevRef",
    types: &[Type::Object(&BLOCKDEV_OPTIONS), STR],
};

/// A child that may be declared absent.
static BLOCKDEV_REF_OR_NULL: Alternate = Alternate {
    name: "BlockdevRefOrNull",
    types: &[Type::Object(&BLOCKDEV_OPTIONS), STR, Type::Null],
};

static FILE_OPTIONS: Object = Object::new(
    "BlockdevOptionsFile",
    &[
        req("filename", STR),
        refused("pr-manager", "persistent reservations are not passed on"),
        opt("locking", Type::Enum(&ON_OFF_AUTO)),
        opt("aio", Type::Enum(&AIO)),
        refused("aio-max-batch", "requests are batched by the ring"),
        opt("drop-cache", BOOL),
        refused("x-check-cache-dropped", "it is QEMU's debugging aid"),
    ],
);

static ON_OFF_AUTO: Enum = Enum {
    name: "OnOffAuto",
    values: &["auto", "on", "off"],
};

static AIO: Enum = Enum {
    name: "BlockdevAioOptions",
    values: &["threads", "native", "io_uring"],
};

static NULL_OPTIONS: Object = Object::new(
    "BlockdevOptionsNull",
    &[
        opt("size", INT),
        opt("latency-ns", U64),
        opt("read-zeroes", BOOL),
    ],
);

static NBD_OPTIONS: Object = Object::new(
    "BlockdevOptionsNbd",
    &[
        req("server", Type::Object(&export::SOCKET_ADDRESS)),
        opt("export", STR),
        refused("tls-creds", "TLS is not spoken"),
        refused("tls-hostname", "TLS is not spoken"),
        refused("x-dirty-bitmap", "only base:allocation is asked for"),
        opt("reconnect-delay", U32),
        opt("open-timeout", U32),
    ],
);

pub(super) static FORMAT_OPTIONS: Object = Object::new(
    "BlockdevOptionsGenericFormat",
    &[req("file", Type::Alternate(&BLOCKDEV_REF))],
);

static RAW_OPTIONS: Object = Object::new(
    "BlockdevOptionsRaw",
    &[opt("offset", INT), opt("size", INT)],
)
.based(&FORMAT_OPTIONS);

const WHERE_DISCARD_GOES: &str = "only discards of the guest are passed on";

static QCOW2_OPTIONS: Object = Object::new(
    "BlockdevOptionsQcow2",
    &[
        opt("backing", Type::Alternate(&BLOCKDEV_REF_OR_NULL)),
        opt("lazy-refcounts", BOOL),
        opt("pass-discard-request", BOOL),
        refused(
            "pass-discard-snapshot",
            "pass-discard-request is heeded for snapshots, too",
        ),
        refused("pass-discard-other", WHERE_DISCARD_GOES),
        opt("discard-no-unref", BOOL),
        refused("overlap-check", "what is checked is not to be chosen"),
        opt("cache-size", INT),
        opt("l2-cache-size", INT),
        opt("l2-cache-entry-size", INT),
        opt("refcount-cache-size", INT),
        refused("cache-clean-interval", "caches keep what fits"),
        refused("encrypt", "encrypted images cannot be opened"),
        refused("data-file", "external data files cannot be opened"),
    ],
)
.based(&FORMAT_OPTIONS);

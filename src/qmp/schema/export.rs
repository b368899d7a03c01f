//! Exports and the NBD server.

use super::{
    Alternate, BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Event, Object, SIZE, STR, Type, U16, U32,
    Variants, cmd, opt, refused, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("block-export-add", &EXPORT_OPTIONS, EMPTY_RESULT),
    cmd("block-export-del", &DEL_ARGS, EMPTY_RESULT),
    cmd(
        "query-block-exports",
        &EMPTY,
        Type::Array(&Type::Object(&EXPORT_INFO)),
    ),
    cmd("nbd-server-start", &START_ARGS, EMPTY_RESULT),
    cmd("nbd-server-stop", &EMPTY, EMPTY_RESULT),
    Command {
        features: &["deprecated"],
        ..cmd("nbd-server-add", &NBD_ADD_ARGS, EMPTY_RESULT)
    },
    Command {
        features: &["deprecated"],
        ..cmd("nbd-server-remove", &NBD_REMOVE_ARGS, EMPTY_RESULT)
    },
];

pub(super) static EVENTS: &[Event] = &[Event {
    name: "BLOCK_EXPORT_DELETED",
    data: &EXPORT_DELETED,
}];

/// The description of an export: options of `--export`, arguments of `block-export-add`.
pub static EXPORT_OPTIONS: Object = Object {
    name: "BlockExportOptions",
    base: None,
    members: &[
        req("type", Type::Enum(&EXPORT_TYPE)),
        req("id", STR),
        opt("fixed-iothread", BOOL),
        opt("iothread", STR),
        req("node-name", STR),
        opt("writable", BOOL),
        opt("writethrough", BOOL),
        refused("allow-inactive", "nodes are always active"),
    ],
    variants: Some(Variants {
        tag: "type",
        branches: &[("nbd", &NBD_EXPORT), ("ublk", &UBLK_EXPORT)],
    }),
};

/// Options of `--nbd-server`.
pub static NBD_SERVER_OPTIONS: Object = Object::new(
    "NbdServerOptions",
    &[req("addr", Type::Object(&SOCKET_ADDRESS))],
)
.based(&NBD_SERVER_BASE);

static EXPORT_TYPE: Enum = Enum {
    name: "BlockExportType",
    values: &["nbd", "ublk"],
};

static NBD_EXPORT: Object = Object::new(
    "BlockExportOptionsNbd",
    &[
        opt("name", STR),
        opt("description", STR),
        opt("bitmaps", Type::Array(&Type::Alternate(&BITMAP_REF))),
        opt("allocation-depth", BOOL),
    ],
);

/// A dirty bitmap: its name, or the node that has it and its name.
static BITMAP_REF: Alternate = Alternate {
    name: "BlockDirtyBitmapOrStr",
    types: &[STR, Type::Object(&BITMAP)],
};

static BITMAP: Object = Object::new("BlockDirtyBitmap", &[req("node", STR), req("name", STR)]);

static UBLK_EXPORT: Object = Object::new(
    "BlockExportOptionsUblk",
    &[
        opt("device-id", U32),
        opt("queues", U16),
        opt("queue-depth", U16),
        opt("zero-copy", Type::Enum(&ZERO_COPY)),
        opt("logical-block-size", SIZE),
    ],
);

static ZERO_COPY: Enum = Enum {
    name: "UblkZeroCopy",
    values: &["auto", "on", "off"],
};

static DEL_ARGS: Object = Object::new(
    "block-export-del-arg",
    &[req("id", STR), opt("mode", Type::Enum(&REMOVE_MODE))],
);

static REMOVE_MODE: Enum = Enum {
    name: "BlockExportRemoveMode",
    values: &["safe", "hard"],
};

static EXPORT_INFO: Object = Object {
    name: "BlockExportInfo",
    base: None,
    members: &[
        req("id", STR),
        req("type", Type::Enum(&EXPORT_TYPE)),
        req("node-name", STR),
        req("shutting-down", BOOL),
    ],
    variants: Some(Variants {
        tag: "type",
        branches: &[("ublk", &UBLK_INFO)],
    }),
};

static UBLK_INFO: Object = Object::new(
    "BlockExportInfoUblk",
    &[
        req("device", STR),
        req("device-id", U32),
        req("zero-copy", BOOL),
        req("queues", U16),
        req("queue-depth", U16),
        req("logical-block-size", U32),
    ],
);

static EXPORT_DELETED: Object = Object::new("BLOCK_EXPORT_DELETED-arg", &[req("id", STR)]);

static NBD_SERVER_BASE: Object = Object::new(
    "NbdServerOptionsBase",
    &[
        opt("handshake-max-seconds", U32),
        opt("tls-creds", STR),
        refused("tls-authz", "TLS is not spoken"),
        opt("max-connections", U32),
    ],
);

static START_ARGS: Object = Object::new(
    "NbdServerOptionsLegacy",
    &[req("addr", Type::Object(&SOCKET_ADDRESS_LEGACY))],
)
.based(&NBD_SERVER_BASE);

static SOCKET_ADDRESS_TYPE: Enum = Enum {
    name: "SocketAddressType",
    values: &["inet", "unix"],
};

pub(super) static SOCKET_ADDRESS: Object = Object::new(
    "SocketAddress",
    &[req("type", Type::Enum(&SOCKET_ADDRESS_TYPE))],
)
.union("type", &[("inet", &INET_ADDRESS), ("unix", &UNIX_ADDRESS)]);

static SOCKET_ADDRESS_LEGACY: Object = Object::new(
    "SocketAddressLegacy",
    &[req("type", Type::Enum(&SOCKET_ADDRESS_TYPE))],
)
.union(
    "type",
    &[
        ("inet", &INET_ADDRESS_WRAPPER),
        ("unix", &UNIX_ADDRESS_WRAPPER),
    ],
);

static INET_ADDRESS_WRAPPER: Object = Object::new(
    "InetSocketAddressWrapper",
    &[req("data", Type::Object(&INET_ADDRESS))],
);

static UNIX_ADDRESS_WRAPPER: Object = Object::new(
    "UnixSocketAddressWrapper",
    &[req("data", Type::Object(&UNIX_ADDRESS))],
);

static INET_ADDRESS: Object = Object::new(
    "InetSocketAddress",
    &[
        req("host", STR),
        req("port", STR),
        opt("numeric", BOOL),
        opt("to", U16),
        opt("ipv4", BOOL),
        opt("ipv6", BOOL),
        refused("keep-alive", "connections are not probed"),
        refused("mptcp", "only TCP is spoken"),
    ],
);

static UNIX_ADDRESS: Object = Object::new(
    "UnixSocketAddress",
    &[
        req("path", STR),
        refused("abstract", "only sockets in the file system are served"),
        refused("tight", "only sockets in the file system are served"),
    ],
);

static NBD_ADD_ARGS: Object = Object::new(
    "NbdServerAddOptions",
    &[
        opt("name", STR),
        opt("description", STR),
        req("device", STR),
        opt("writable", BOOL),
        opt("bitmap", STR),
    ],
);

static NBD_REMOVE_ARGS: Object = Object::new(
    "nbd-server-remove-arg",
    &[req("name", STR), opt("mode", Type::Enum(&REMOVE_MODE))],
);

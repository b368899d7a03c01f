//! What queries say about nodes.

use super::snapshot::SNAPSHOT_INFO;
use super::{BOOL, Command, EMPTY, Enum, INT, Object, STR, Type, Variants, cmd, node, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd(
        "query-named-block-nodes",
        &NAMED_ARGS,
        Type::Array(&Type::Object(&DEVICE_INFO)),
    ),
    cmd(
        "query-block",
        &EMPTY,
        Type::Array(&Type::Object(&BLOCK_INFO)),
    ),
    Command {
        features: &["unstable"],
        ..cmd(
            "x-debug-query-block-graph",
            &EMPTY,
            Type::Object(&BLOCK_GRAPH),
        )
    },
];

static NAMED_ARGS: Object = Object::new("query-named-block-nodes-arg", &[opt("flat", BOOL)]);

/// One node.
pub(super) static DEVICE_INFO: Object = Object::new(
    "BlockDeviceInfo",
    &[
        req("file", STR),
        opt("node-name", STR),
        req("ro", BOOL),
        req("drv", STR),
        opt("backing_file", STR),
        req("backing_file_depth", INT),
        req("active", BOOL),
        req("encrypted", BOOL),
        req("detect_zeroes", Type::Enum(&node::DETECT_ZEROES)),
        req("bps", INT),
        req("bps_rd", INT),
        req("bps_wr", INT),
        req("iops", INT),
        req("iops_rd", INT),
        req("iops_wr", INT),
        req("image", Type::Object(&IMAGE_INFO)),
        req("cache", Type::Object(&CACHE_INFO)),
        req("write_threshold", INT),
        opt(
            "dirty-bitmaps",
            Type::Array(&Type::Object(&DIRTY_BITMAP_INFO)),
        ),
    ],
);

static DIRTY_BITMAP_INFO: Object = Object::new(
    "BlockDirtyInfo",
    &[
        opt("name", STR),
        req("count", INT),
        req("granularity", INT),
        req("recording", BOOL),
        req("busy", BOOL),
        req("persistent", BOOL),
        opt("inconsistent", BOOL),
    ],
);

static CACHE_INFO: Object = Object::new(
    "BlockdevCacheInfo",
    &[
        req("writeback", BOOL),
        req("direct", BOOL),
        req("no-flush", BOOL),
    ],
);

static IMAGE_INFO: Object = Object::new(
    "ImageInfo",
    &[
        req("filename", STR),
        req("format", STR),
        opt("dirty-flag", BOOL),
        opt("actual-size", INT),
        req("virtual-size", INT),
        opt("cluster-size", INT),
        opt("encrypted", BOOL),
        opt("compressed", BOOL),
        opt("backing-filename", STR),
        opt("full-backing-filename", STR),
        opt("backing-filename-format", STR),
        opt("snapshots", Type::Array(&Type::Object(&SNAPSHOT_INFO))),
        opt("format-specific", Type::Object(&FORMAT_SPECIFIC)),
        opt("backing-image", Type::Object(&IMAGE_INFO)),
    ],
);

static FORMAT_SPECIFIC: Object = Object {
    name: "ImageInfoSpecific",
    base: None,
    members: &[req("type", Type::Enum(&FORMAT_SPECIFIC_KIND))],
    variants: Some(Variants {
        tag: "type",
        branches: &[
            ("qcow2", &QCOW2_SPECIFIC_WRAPPER),
            ("file", &FILE_SPECIFIC_WRAPPER),
        ],
    }),
};

static FORMAT_SPECIFIC_KIND: Enum = Enum {
    name: "ImageInfoSpecificKind",
    values: &["qcow2", "file"],
};

static QCOW2_SPECIFIC_WRAPPER: Object = Object::new(
    "ImageInfoSpecificQCow2Wrapper",
    &[req("data", Type::Object(&QCOW2_SPECIFIC))],
);

static QCOW2_SPECIFIC: Object = Object::new(
    "ImageInfoSpecificQCow2",
    &[
        req("compat", STR),
        opt("extended-l2", BOOL),
        opt("lazy-refcounts", BOOL),
        opt("corrupt", BOOL),
        req("refcount-bits", INT),
        opt("bitmaps", Type::Array(&Type::Object(&QCOW2_BITMAP))),
        req("compression-type", Type::Enum(&COMPRESSION_TYPE)),
    ],
);

static QCOW2_BITMAP: Object = Object::new(
    "Qcow2BitmapInfo",
    &[
        req("name", STR),
        req("granularity", INT),
        req("flags", Type::Array(&Type::Enum(&QCOW2_BITMAP_FLAGS))),
    ],
);

static QCOW2_BITMAP_FLAGS: Enum = Enum {
    name: "Qcow2BitmapInfoFlags",
    values: &["in-use", "auto"],
};

static COMPRESSION_TYPE: Enum = Enum {
    name: "Qcow2CompressionType",
    values: &["zlib", "zstd"],
};

static FILE_SPECIFIC_WRAPPER: Object = Object::new(
    "ImageInfoSpecificFileWrapper",
    &[req("data", Type::Object(&FILE_SPECIFIC))],
);

static FILE_SPECIFIC: Object =
    Object::new("ImageInfoSpecificFile", &[opt("extent-size-hint", INT)]);

static BLOCK_INFO: Object = Object::new(
    "BlockInfo",
    &[
        req("device", STR),
        opt("qdev", STR),
        req("type", STR),
        req("removable", BOOL),
        req("locked", BOOL),
        opt("inserted", Type::Object(&DEVICE_INFO)),
    ],
);

static BLOCK_GRAPH: Object = Object::new(
    "XDbgBlockGraph",
    &[
        req("nodes", Type::Array(&Type::Object(&GRAPH_NODE))),
        req("edges", Type::Array(&Type::Object(&GRAPH_EDGE))),
    ],
);

static GRAPH_NODE: Object = Object::new(
    "XDbgBlockGraphNode",
    &[
        req("id", INT),
        req("type", Type::Enum(&GRAPH_NODE_TYPE)),
        req("name", STR),
    ],
);

static GRAPH_NODE_TYPE: Enum = Enum {
    name: "XDbgBlockGraphNodeType",
    values: &["block-backend", "block-job", "block-driver"],
};

static GRAPH_EDGE: Object = Object::new(
    "XDbgBlockGraphEdge",
    &[
        req("parent", INT),
        req("child", INT),
        req("name", STR),
        req("perm", Type::Array(&Type::Enum(&PERMISSION))),
        req("shared-perm", Type::Array(&Type::Enum(&PERMISSION))),
    ],
);

pub(super) static PERMISSION: Enum = Enum {
    name: "BlockPermission",
    values: &["consistent-read", "write", "write-unchanged", "resize"],
};

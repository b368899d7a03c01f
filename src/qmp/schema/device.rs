//! Sizes and statistics.

use super::{BOOL, Command, EMPTY_RESULT, Enum, INT, Object, STR, Type, Variants, cmd, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd("block_resize", &RESIZE_ARGS, EMPTY_RESULT),
    cmd(
        "query-blockstats",
        &STATS_ARGS,
        Type::Array(&Type::Object(&BLOCK_STATS)),
    ),
];

static RESIZE_ARGS: Object = Object::new(
    "block_resize-arg",
    &[opt("device", STR), opt("node-name", STR), req("size", INT)],
);

static STATS_ARGS: Object = Object::new("query-blockstats-arg", &[opt("query-nodes", BOOL)]);

static BLOCK_STATS: Object = Object::new(
    "BlockStats",
    &[
        opt("device", STR),
        opt("qdev", STR),
        opt("node-name", STR),
        req("stats", Type::Object(&DEVICE_STATS)),
        opt("driver-specific", Type::Object(&DRIVER_STATS)),
        opt("parent", Type::Object(&BLOCK_STATS)),
        opt("backing", Type::Object(&BLOCK_STATS)),
    ],
);

static DEVICE_STATS: Object = Object::new(
    "BlockDeviceStats",
    &[
        req("rd_bytes", INT),
        req("wr_bytes", INT),
        req("zone_append_bytes", INT),
        req("unmap_bytes", INT),
        req("rd_operations", INT),
        req("wr_operations", INT),
        req("zone_append_operations", INT),
        req("flush_operations", INT),
        req("unmap_operations", INT),
        req("rd_total_time_ns", INT),
        req("wr_total_time_ns", INT),
        req("zone_append_total_time_ns", INT),
        req("flush_total_time_ns", INT),
        req("unmap_total_time_ns", INT),
        req("wr_highest_offset", INT),
        req("rd_merged", INT),
        req("wr_merged", INT),
        req("zone_append_merged", INT),
        req("unmap_merged", INT),
        req("failed_rd_operations", INT),
        req("failed_wr_operations", INT),
        req("failed_zone_append_operations", INT),
        req("failed_flush_operations", INT),
        req("failed_unmap_operations", INT),
        req("invalid_rd_operations", INT),
        req("invalid_wr_operations", INT),
        req("invalid_zone_append_operations", INT),
        req("invalid_flush_operations", INT),
        req("invalid_unmap_operations", INT),
        req("account_invalid", BOOL),
        req("account_failed", BOOL),
        req("timed_stats", Type::Array(&Type::Any)),
    ],
);

static DRIVER_STATS: Object = Object {
    name: "BlockStatsSpecific",
    base: None,
    members: &[req("driver", Type::Enum(&STATS_DRIVER))],
    variants: Some(Variants {
        tag: "driver",
        branches: &[("file", &FILE_STATS), ("host_device", &FILE_STATS)],
    }),
};

static STATS_DRIVER: Enum = Enum {
    name: "BlockStatsSpecificDriver",
    values: &["file", "host_device"],
};

static FILE_STATS: Object = Object::new(
    "BlockStatsSpecificFile",
    &[
        req("discard-nb-ok", INT),
        req("discard-nb-failed", INT),
        req("discard-bytes-ok", INT),
    ],
);

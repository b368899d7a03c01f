//! Dirty bitmaps.

use super::{Alternate, BOOL, Command, EMPTY_RESULT, Object, STR, Type, U32, cmd, opt, req};

pub(super) static COMMANDS: &[Command] = &[
    cmd("block-dirty-bitmap-add", &ADD, EMPTY_RESULT),
    cmd("block-dirty-bitmap-remove", &BITMAP, EMPTY_RESULT),
    cmd("block-dirty-bitmap-clear", &BITMAP, EMPTY_RESULT),
    cmd("block-dirty-bitmap-enable", &BITMAP, EMPTY_RESULT),
    cmd("block-dirty-bitmap-disable", &BITMAP, EMPTY_RESULT),
    cmd("block-dirty-bitmap-merge", &MERGE, EMPTY_RESULT),
    Command {
        features: &["unstable"],
        ..cmd(
            "x-debug-block-dirty-bitmap-sha256",
            &BITMAP,
            Type::Object(&SHA256),
        )
    },
];

pub(super) static ADD: Object = Object::new(
    "BlockDirtyBitmapAdd",
    &[
        req("node", STR),
        req("name", STR),
        opt("granularity", U32),
        opt("persistent", BOOL),
        opt("disabled", BOOL),
    ],
);

pub(super) static BITMAP: Object =
    Object::new("BlockDirtyBitmap", &[req("node", STR), req("name", STR)]);

pub(super) static MERGE: Object = Object::new(
    "BlockDirtyBitmapMerge",
    &[
        req("node", STR),
        req("target", STR),
        req("bitmaps", Type::Array(&Type::Alternate(&BITMAP_OR_NAME))),
    ],
);

/// A bitmap of the node at hand, or of another.
static BITMAP_OR_NAME: Alternate = Alternate {
    name: "BlockDirtyBitmapOrStr",
    types: &[STR, Type::Object(&BITMAP)],
};

static SHA256: Object = Object::new("BlockDirtyBitmapSha256", &[req("sha256", STR)]);

//! Objects: I/O threads, secrets and throttle groups.

use super::{
    Command, EMPTY_RESULT, Enum, INT, Object, STR, Type, Variants, cmd, filter, opt, refused, req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("object-add", &OBJECT_OPTIONS, EMPTY_RESULT),
    cmd("object-del", &DEL_ARGS, EMPTY_RESULT),
    cmd("qom-get", &GET_ARGS, Type::Any),
    cmd("qom-set", &SET_ARGS, EMPTY_RESULT),
];

/// The description of an object: options of `--object`, arguments of `object-add`.
pub static OBJECT_OPTIONS: Object = Object {
    name: "ObjectOptions",
    base: None,
    members: &[req("qom-type", Type::Enum(&OBJECT_TYPE)), req("id", STR)],
    variants: Some(Variants {
        tag: "qom-type",
        branches: &[
            ("iothread", &IOTHREAD_OPTIONS),
            ("secret", &SECRET_OPTIONS),
            ("throttle-group", &filter::THROTTLE_GROUP_OPTIONS),
        ],
    }),
};

static OBJECT_TYPE: Enum = Enum {
    name: "ObjectType",
    values: &["iothread", "secret", "throttle-group"],
};

/// The types of objects that can be made.
pub fn object_types() -> &'static [&'static str] {
    OBJECT_TYPE.values
}

static GET_ARGS: Object = Object::new("qom-get-arg", &[req("path", STR), req("property", STR)]);

static SET_ARGS: Object = Object::new(
    "qom-set-arg",
    &[
        req("path", STR),
        req("property", STR),
        req("value", Type::Any),
    ],
);

static DEL_ARGS: Object = Object::new("object-del-arg", &[req("id", STR)]);

const NOTHING_TO_TUNE: &str = "the I/O loop has nothing that it could tune";

static IOTHREAD_OPTIONS: Object = Object::new(
    "IothreadProperties",
    &[
        refused("aio-max-batch", NOTHING_TO_TUNE),
        refused("thread-pool-min", NOTHING_TO_TUNE),
        refused("thread-pool-max", NOTHING_TO_TUNE),
    ],
)
.based(&POLL_PROPERTIES);

/// How an I/O thread polls: what `object-add` gives and `qom-set` changes.
pub static POLL_PROPERTIES: Object = Object::new(
    "PollProperties",
    &[
        opt("poll-max-ns", INT),
        opt("poll-grow", INT),
        opt("poll-shrink", INT),
    ],
);

static SECRET_OPTIONS: Object = Object::new(
    "SecretProperties",
    &[
        opt("format", Type::Enum(&SECRET_FORMAT)),
        refused("keyid", "secrets are given in the clear or by file"),
        refused("iv", "secrets are given in the clear or by file"),
        opt("data", STR),
        opt("file", STR),
    ],
);

static SECRET_FORMAT: Enum = Enum {
    name: "QCryptoSecretFormat",
    values: &["raw", "base64"],
};

//! Commands about the monitor and the daemon themselves.

use super::{
    BOOL, Command, EMPTY, EMPTY_RESULT, Enum, Event, INT, Object, STR, Type, Variants, cmd, opt,
    req,
};

pub(super) static COMMANDS: &[Command] = &[
    cmd("qmp_capabilities", &CAPABILITIES_ARGS, EMPTY_RESULT),
    cmd("query-version", &EMPTY, Type::Object(&VERSION_INFO)),
    cmd(
        "query-commands",
        &EMPTY,
        Type::Array(&Type::Object(&COMMAND_INFO)),
    ),
    cmd(
        "query-qmp-schema",
        &EMPTY,
        Type::Array(&Type::Object(&SCHEMA_INFO)),
    ),
    cmd("query-status", &EMPTY, Type::Object(&STATUS_INFO)),
    cmd("stop", &EMPTY, EMPTY_RESULT),
    cmd("cont", &EMPTY, EMPTY_RESULT),
    cmd("quit", &EMPTY, EMPTY_RESULT),
];

pub(super) static EVENTS: &[Event] = &[
    Event {
        name: "STOP",
        data: &EMPTY,
    },
    Event {
        name: "RESUME",
        data: &EMPTY,
    },
];

/// Options of `--monitor`.
pub static MONITOR_OPTIONS: Object = Object::new(
    "MonitorOptions",
    &[
        opt("id", STR),
        opt("mode", Type::Enum(&MONITOR_MODE)),
        opt("pretty", BOOL),
        req("chardev", STR),
    ],
);

static MONITOR_MODE: Enum = Enum {
    name: "MonitorMode",
    values: &["readline", "control"],
};

static CAPABILITIES_ARGS: Object = Object::new(
    "qmp_capabilities-arg",
    &[opt("enable", Type::Array(&Type::Enum(&CAPABILITY)))],
);

static CAPABILITY: Enum = Enum {
    name: "QMPCapability",
    values: &["oob"],
};

static VERSION_INFO: Object = Object::new(
    "VersionInfo",
    &[
        req("qemu", Type::Object(&VERSION_TRIPLE)),
        req("package", STR),
    ],
);

static VERSION_TRIPLE: Object = Object::new(
    "VersionTriple",
    &[req("major", INT), req("minor", INT), req("micro", INT)],
);

static COMMAND_INFO: Object = Object::new("CommandInfo", &[req("name", STR)]);

static STATUS_INFO: Object = Object::new(
    "StatusInfo",
    &[req("running", BOOL), req("status", Type::Enum(&RUN_STATE))],
);

static RUN_STATE: Enum = Enum {
    name: "RunState",
    values: &["running", "paused"],
};

static SCHEMA_INFO: Object = Object {
    name: "SchemaInfo",
    base: None,
    members: &[
        req("name", STR),
        req("meta-type", Type::Enum(&META_TYPE)),
        opt("features", Type::Array(&STR)),
    ],
    variants: Some(Variants {
        tag: "meta-type",
        branches: &[
            ("builtin", &SCHEMA_BUILTIN),
            ("enum", &SCHEMA_ENUM),
            ("array", &SCHEMA_ARRAY),
            ("object", &SCHEMA_OBJECT),
            ("alternate", &SCHEMA_ALTERNATE),
            ("command", &SCHEMA_COMMAND),
            ("event", &SCHEMA_EVENT),
        ],
    }),
};

static META_TYPE: Enum = Enum {
    name: "SchemaMetaType",
    values: &[
        "builtin",
        "enum",
        "array",
        "object",
        "alternate",
        "command",
        "event",
    ],
};

static JSON_TYPE: Enum = Enum {
    name: "JSONType",
    values: &[
        "string", "number", "int", "boolean", "null", "object", "array", "value",
    ],
};

static SCHEMA_BUILTIN: Object = Object::new(
    "SchemaInfoBuiltin",
    &[req("json-type", Type::Enum(&JSON_TYPE))],
);

static SCHEMA_ENUM: Object = Object::new(
    "SchemaInfoEnum",
    &[
        req("members", Type::Array(&Type::Object(&SCHEMA_ENUM_MEMBER))),
        req("values", Type::Array(&STR)).features(&["deprecated"]),
    ],
);

static SCHEMA_ENUM_MEMBER: Object = Object::new(
    "SchemaInfoEnumMember",
    &[req("name", STR), opt("features", Type::Array(&STR))],
);

static SCHEMA_ARRAY: Object = Object::new("SchemaInfoArray", &[req("element-type", STR)]);

static SCHEMA_OBJECT: Object = Object::new(
    "SchemaInfoObject",
    &[
        req("members", Type::Array(&Type::Object(&SCHEMA_OBJECT_MEMBER))),
        opt("tag", STR),
        opt(
            "variants",
            Type::Array(&Type::Object(&SCHEMA_OBJECT_VARIANT)),
        ),
    ],
);

static SCHEMA_OBJECT_MEMBER: Object = Object::new(
    "SchemaInfoObjectMember",
    &[
        req("name", STR),
        req("type", STR),
        opt("default", Type::Any),
        opt("features", Type::Array(&STR)),
    ],
);

static SCHEMA_OBJECT_VARIANT: Object = Object::new(
    "SchemaInfoObjectVariant",
    &[req("case", STR), req("type", STR)],
);

static SCHEMA_ALTERNATE: Object = Object::new(
    "SchemaInfoAlternate",
    &[req(
        "members",
        Type::Array(&Type::Object(&SCHEMA_ALTERNATE_MEMBER)),
    )],
);

static SCHEMA_ALTERNATE_MEMBER: Object =
    Object::new("SchemaInfoAlternateMember", &[req("type", STR)]);

static SCHEMA_COMMAND: Object = Object::new(
    "SchemaInfoCommand",
    &[
        req("arg-type", STR),
        req("ret-type", STR),
        opt("allow-oob", BOOL),
    ],
);

static SCHEMA_EVENT: Object = Object::new("SchemaInfoEvent", &[req("arg-type", STR)]);

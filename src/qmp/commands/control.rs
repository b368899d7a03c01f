//! Commands about the monitor and the daemon themselves.

use serde_json::{Value, json};

use super::Context;
use crate::qmp::error::QmpError;
use crate::qmp::schema;

/// The version of QEMU whose behaviour is kept: what clients compare with.
pub(super) fn version() -> Value {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": concat!("liveblk ", env!("CARGO_PKG_VERSION")),
    })
}

pub(super) fn query_commands() -> Result<Value, QmpError> {
    let names = schema::commands().map(|command| json!({"name": command.name}));
    Ok(names.collect())
}

pub(super) fn query_status(context: &Context) -> Result<Value, QmpError> {
    let running = context.running.get();
    let status = if running { "running" } else { "paused" };
    Ok(json!({"running": running, "status": status}))
}

/// `stop` and `cont`: there is no guest to stop; the state is kept and told, as clients expect it.
pub(super) fn set_running(context: &Context, running: bool) -> Result<Value, QmpError> {
    if context.running.replace(running) != running {
        let event = if running { "RESUME" } else { "STOP" };
        context.events.emit(event, Value::Null);
    }
    Ok(json!({}))
}

//! What happens in the graph, as events of QMP tell it.

use nix::errno::Errno;
use serde_json::json;

use crate::block::BlockEvent;
use crate::error::strerror;
use crate::qmp::events::EventBus;
use crate::qmp::limited_events::LimitedEvents;

/// Tells clients of what happened in the graph.
pub(super) fn tell(events: &EventBus, limited: &LimitedEvents, event: BlockEvent) {
    match event {
        BlockEvent::ImageCorrupted {
            node_name,
            message,
            offset,
            size,
            fatal,
        } => {
            let mut data =
                json!({"device": "", "node-name": node_name, "msg": message, "fatal": fatal});
            if let Some(offset) = offset {
                data["offset"] = offset.into();
            }
            if let Some(size) = size {
                data["size"] = size.into();
            }
            events.emit("BLOCK_IMAGE_CORRUPTED", data);
        }
        BlockEvent::RequestFailed {
            user,
            node_name,
            writes,
            errno,
        } => {
            let data = json!({
                "qom-path": user,
                "device": "",
                "node-name": node_name,
                "operation": if writes { "write" } else { "read" },
                "action": "report",
                "nospace": errno == Errno::ENOSPC,
                "reason": strerror(errno),
            });
            limited.emit("BLOCK_IO_ERROR", &user, data);
        }
    }
}

//! `liveblk device-name`: which export a block device is, for the udev rule that makes its link.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

use super::args::DeviceNameArguments;
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint};

/// How long one instance may take: a worker of udev waits for us.
const LIMIT: Duration = Duration::from_secs(3);

pub(super) fn run(arguments: &DeviceNameArguments) -> Result<Outcome> {
    let directory = endpoint::directory()?;
    let device = arguments.device.as_str();
    for instance in endpoint::instances(&directory) {
        let socket = endpoint::of_instance(&directory, &instance)?;
        // One that does not answer may not keep others' links away.
        let exports = QmpClient::connect_within(&socket, LIMIT)
            .and_then(|mut client| client.execute("query-block-exports", Map::new()));
        if let Some(id) = exports
            .ok()
            .as_ref()
            .and_then(|exports| id_of(exports, device))
        {
            return Ok(Outcome::text(format!("{instance}/{id}\n")));
        }
    }
    let text = format!(
        "'{device}' is no device of an instance in '{}'",
        directory.display()
    );
    Err(Error::new(ErrorKind::NotFound, text))
}

fn id_of<'a>(exports: &'a Value, device: &str) -> Option<&'a str> {
    exports
        .as_array()?
        .iter()
        .find(|export| export["device"] == device)?["id"]
        .as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_export_of_this_device_is_named() {
        let exports = json!([{"id": "n"}, {"id": "a", "device": "/dev/ublkb1"}]);
        assert_eq!(id_of(&exports, "/dev/ublkb1"), Some("a"));
        assert_eq!(id_of(&exports, "/dev/ublkb10"), None);
        assert_eq!(id_of(&json!({}), "/dev/ublkb1"), None);
    }
}

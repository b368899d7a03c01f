//! `liveblk serve`: the daemon in this process, with options made from images.
//!
//! No image is created or changed but by who uses the device. Beside the devices there is one control
//! socket, made when all images are open, and removed at the end.

mod disk;

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use crate::daemon::command_line::Item;
use crate::daemon::{self, Face};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::percent_encoded;
use crate::runtime::remove_socket;

use super::args::ServeArguments;
use super::endpoint;
use disk::{Disk, absolute_text};

/// Serves until told to stop.
///
/// # Errors
/// What can be said without opening an image; the daemon itself reports the rest.
pub(super) fn run(arguments: &ServeArguments) -> Result<ExitCode> {
    let disks = Disk::all(arguments)?;
    let socket = control_socket(arguments, &disks)?;
    let nbd = arguments.nbd.as_deref().map(absolute_text).transpose()?;
    let items = items(arguments, &disks, &socket, nbd.as_deref());
    let names = disks.into_iter().map(|disk| disk.name).collect();
    let ready = move |exports: &Value| announce(exports, names, nbd.as_deref());
    let code = daemon::serve(items, Face::new("liveblk", ready));
    remove_control_socket(Path::new(&socket));
    Ok(code)
}

/// The daemon's options in their order: images first, so that what is wrong with them shows before
/// anything is visible outside.
fn items(arguments: &ServeArguments, disks: &[Disk], socket: &str, nbd: Option<&str>) -> Vec<Item> {
    let mut items: Vec<Item> = disks.iter().map(|disk| disk.blockdev(arguments)).collect();
    let path = socket.replace(',', ",,");
    items.push(Item::Chardev(format!(
        "socket,id=control,path={path},server=on,wait=off"
    )));
    items.push(Item::Monitor("chardev=control".to_string()));
    if let Some(nbd) = nbd {
        let path = nbd.replace(',', ",,");
        items.push(Item::NbdServer(format!("addr.type=unix,addr.path={path}")));
    }
    items.extend(disks.iter().map(|disk| disk.export(arguments)));
    items
}

/// Path of the control socket; nobody listens on it.
fn control_socket(arguments: &ServeArguments, disks: &[Disk]) -> Result<String> {
    let path = match (&arguments.endpoint.socket, &arguments.endpoint.name) {
        (Some(socket), _) => socket.clone(),
        (None, Some(name)) => in_directory(name)?,
        (None, None) => match disks.first() {
            Some(disk) => in_directory(&disk.name)?,
            None => unreachable!("clap demands an image"),
        },
    };
    if UnixStream::connect(&path).is_ok() {
        let text = format!(
            "an instance with the control socket '{}' is running; choose another --name",
            path.display()
        );
        return Err(Error::new(ErrorKind::InUse, text));
    }
    absolute_text(&path)
}

/// The socket of the instance `name`, whose directory is made if it is not there.
fn in_directory(name: &str) -> Result<PathBuf> {
    let directory = endpoint::directory()?;
    let path = endpoint::of_instance(&directory, name)?;
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory);
    made.map_err(|error| {
        Error::from(error).context(format!("cannot make '{}'", directory.display()))
    })?;
    Ok(path)
}

fn remove_control_socket(path: &Path) {
    if let Err(error) = remove_socket(path) {
        tracing::warn!(path = %path.display(), %error, "control socket could not be removed");
    }
}

/// Tells where each disk is, in the order of the images.
fn announce(exports: &Value, names: Vec<String>, nbd: Option<&str>) -> Result<(), String> {
    let mut text = String::new();
    for name in names {
        let place = match nbd {
            Some(socket) => format!(
                "nbd+unix:///{name}?socket={}",
                percent_encoded(socket, b"@")
            ),
            None => device(exports, &name)?,
        };
        text += &place;
        text.push('\n');
    }
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    written.map_err(|error| format!("cannot write to standard output: {error}"))
}

fn device(exports: &Value, id: &str) -> Result<String, String> {
    let exports = exports.as_array().map(Vec::as_slice).unwrap_or_default();
    exports
        .iter()
        .find(|export| export["id"] == id)
        .and_then(|export| export["device"].as_str())
        .map(str::to_string)
        .ok_or_else(|| format!("the export '{id}' went away"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn devices_are_found_by_their_export() {
        let exports = json!([
            {"id": "b", "device": "/dev/ublkb1"},
            {"id": "a", "device": "/dev/ublkb0"},
        ]);
        assert_eq!(device(&exports, "a"), Ok("/dev/ublkb0".to_string()));
        assert!(device(&exports, "c").is_err());
    }
}

//! Where the control socket of an instance is.
//!
//! An instance NAME listens on `DIRECTORY/NAME.sock`. The directory is the value of
//! `LIVEBLK_RUNTIME_DIR`, else `/run/liveblk` for root, else `$XDG_RUNTIME_DIR/liveblk`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use crate::error::{Error, ErrorKind, Result};

use super::args::EndpointArguments;

/// Longest name of an instance, in bytes: with a directory it must fit a socket's address (107 bytes).
const NAME_MAX: usize = 64;

const SUFFIX: &str = ".sock";

/// The socket that the user means: the one named, or the only one there is.
pub(super) fn find(arguments: &EndpointArguments) -> Result<PathBuf> {
    match (&arguments.socket, &arguments.name) {
        (Some(socket), _) => Ok(socket.clone()),
        (None, Some(name)) => of_instance(&directory()?, name),
        (None, None) => only_one(&directory()?),
    }
}

/// The directory of sockets; it need not exist.
///
/// # Errors
/// Neither root nor `XDG_RUNTIME_DIR`.
pub(super) fn directory() -> Result<PathBuf> {
    let from = |variable| env::var_os(variable).filter(|value| !value.is_empty());
    if let Some(directory) = from("LIVEBLK_RUNTIME_DIR") {
        return Ok(directory.into());
    }
    if Uid::effective().is_root() {
        return Ok(PathBuf::from("/run/liveblk"));
    }
    let missing =
        "no directory for control sockets: XDG_RUNTIME_DIR is not set; give --socket PATH";
    from("XDG_RUNTIME_DIR")
        .map(|directory| Path::new(&directory).join("liveblk"))
        .ok_or_else(|| Error::new(ErrorKind::NotFound, missing))
}

/// The socket of the instance `name`.
///
/// # Errors
/// The name cannot be a file's name.
pub(super) fn of_instance(directory: &Path, name: &str) -> Result<PathBuf> {
    let part = |c: char| c.is_ascii_alphanumeric() || "-_.+@".contains(c);
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    if !starts_well || !name.chars().all(part) || name.len() > NAME_MAX {
        let rule = format!(
            "letters, digits and '-_.+@', at most {NAME_MAX}, a letter, a digit or '_' first"
        );
        let text = format!("'{name}' cannot be the name of an instance: {rule}");
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    Ok(directory.join(format!("{name}{SUFFIX}")))
}

fn only_one(directory: &Path) -> Result<PathBuf> {
    let place = directory.display();
    let mut names = instances(directory);
    match (names.pop(), names.is_empty()) {
        (Some(name), true) => of_instance(directory, &name),
        (Some(last), false) => {
            names.push(last);
            let text = format!(
                "several instances run, choose one with --name: {}",
                names.join(", ")
            );
            Err(Error::new(ErrorKind::InvalidArgument, text))
        }
        (None, _) => {
            let text = format!("no control socket in {place}; give --name NAME or --socket PATH");
            Err(Error::new(ErrorKind::NotFound, text))
        }
    }
}

/// Names of the instances that have a socket, sorted.
pub(super) fn instances(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|file| Some(file.strip_suffix(SUFFIX)?.to_string()))
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        let place = Path::new("/run/liveblk");
        let good = of_instance(place, "vm-1").unwrap();
        assert_eq!(good, Path::new("/run/liveblk/vm-1.sock"));
        for name in ["", ".", "../x", "a/b", "-n", "a b", &"a".repeat(65)] {
            assert!(of_instance(place, name).is_err(), "{name}");
        }
    }

    #[test]
    fn without_a_name_the_only_socket_is_meant() {
        let place = tempfile::tempdir().unwrap();
        let error = only_one(place.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        fs::write(place.path().join("a.sock"), "").unwrap();
        fs::write(place.path().join("note"), "").unwrap();
        assert_eq!(only_one(place.path()).unwrap(), place.path().join("a.sock"));
        fs::write(place.path().join("b.sock"), "").unwrap();
        let error = only_one(place.path()).unwrap_err();
        assert!(error.message().ends_with(": a, b"), "{error}");
    }
}

//! `--daemonize`: the daemon runs in a second process; the first one waits until that is ready.
//!
//! The second process is this program started anew, with a mark in its environment and a pipe as standard
//! output over which it says that it is ready: forking a process that may have threads is unsafe.

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

use nix::unistd;

/// Marks the second process.
const MARK: &str = "LIVEBLK_DAEMONIZED";

/// What the second process says.
const READY: &[u8] = b"ready";

/// Whether this is the second process.
pub(super) fn is_background() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts the second process and waits until it is ready, or has failed and said why.
pub(super) fn start() -> Result<ExitCode, String> {
    let failed = |error: std::io::Error| format!("cannot start in the background: {error}");
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_end(&mut said).map_err(failed)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().map_err(failed)?;
    Ok(match status.code() {
        Some(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// The second process, at its start: no terminal, no job control.
pub(super) fn detach() -> Result<(), String> {
    unistd::setsid().map_err(|errno| format!("cannot leave the session: {errno}"))?;
    Ok(())
}

/// The second process is ready: says so, lets go of the directory and of what the first one shared.
pub(super) fn announce() -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot go on in the background: {error}");
    let mut output = std::io::stdout();
    output
        .write_all(READY)
        .and_then(|()| output.flush())
        .map_err(failed)?;
    std::env::set_current_dir("/").map_err(failed)?;
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(failed)?;
    unistd::dup2_stdout(&null)
        .and_then(|()| unistd::dup2_stderr(&null))
        .map_err(|errno| format!("cannot go on in the background: {errno}"))
}

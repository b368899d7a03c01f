//! The storage daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "ublk")]
    if let Some(code) = liveblk::export::ublk::helper_main() {
        return code;
    }
    liveblk::daemon::log::start();
    let arguments = std::env::args_os().skip(1);
    liveblk::daemon::run(arguments.map(|argument| argument.to_string_lossy().into_owned()))
}

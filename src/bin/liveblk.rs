//! The command line for people.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "ublk")]
    if let Some(code) = liveblk::export::ublk::helper_main() {
        return code;
    }
    liveblk::daemon::log::start();
    liveblk::cli::run(std::env::args_os())
}

//! The storage daemon.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    #[cfg(feature = "ublk")]
    if let Some(code) = liveblk::export::ublk::helper_main() {
        return code;
    }
    let filter = EnvFilter::try_from_env("LIVEBLK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let arguments = std::env::args_os().skip(1);
    liveblk::daemon::run(arguments.map(|argument| argument.to_string_lossy().into_owned()))
}

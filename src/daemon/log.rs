//! The log: lines on standard error, chosen by `LIVEBLK_LOG`.

use tracing_subscriber::EnvFilter;

/// From now on warnings and errors are shown, or what `LIVEBLK_LOG` says. To be called once.
pub fn start() {
    let filter = EnvFilter::try_from_env("LIVEBLK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

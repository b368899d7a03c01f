//! The one integration test binary: a module per topic.

#[cfg(feature = "testing")]
mod chain;
mod cli_client;
mod cli_image;
mod cli_usage;
mod differential;
mod imports;
mod layers;
#[cfg(feature = "testing")]
mod model;
mod nbd_peers;
mod nbd_raw;
mod nbd_server;
#[cfg(feature = "testing")]
mod qcow2_check;
mod qmp_command_line;
mod qmp_daemon;
mod qmp_monitor;
mod source;
mod style;
#[cfg(feature = "testing")]
mod sweeps;

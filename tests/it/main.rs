//! The one integration test binary: a module per topic.

// Clippy takes functions beside the tests of an integration binary for shipped code.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "testing")]
mod bitmap_actions;
#[cfg(feature = "testing")]
mod bitmap_rotation;
#[cfg(feature = "testing")]
mod bitmaps;
mod blockdev;
#[cfg(feature = "testing")]
mod chain;
mod cli;
mod cli_backup;
mod cli_bitmap;
mod cli_client;
mod cli_image;
mod cli_jobs;
mod cli_mirror;
mod cli_serve;
mod cli_usage;
#[cfg(feature = "testing")]
mod compressed;
#[cfg(feature = "testing")]
mod contract;
mod copy;
#[cfg(feature = "testing")]
mod copy_before_write;
mod copy_on_read;
#[cfg(feature = "testing")]
mod crashes;
mod differential;
mod filters;
#[cfg(feature = "testing")]
mod fuzzed;
#[cfg(feature = "testing")]
mod hostile;
mod images;
mod imports;
mod job_policies;
#[cfg(feature = "testing")]
mod jobs;
mod layers;
mod locking;
mod manual;
mod mirror_options;
#[cfg(feature = "testing")]
mod model;
#[cfg(feature = "testing")]
mod mutations;
mod nbd_bitmaps;
#[cfg(feature = "testing")]
mod nbd_client;
mod nbd_gone;
mod nbd_peers;
mod nbd_raw;
mod nbd_server;
mod nbd_snapshot;
#[cfg(feature = "testing")]
mod overlapping;
#[cfg(feature = "testing")]
mod qcow2_check;
mod qmp_backup;
mod qmp_bitmaps;
mod qmp_command_line;
mod qmp_daemon;
mod qmp_jobs;
mod qmp_monitor;
mod qmp_nbd;
mod qmp_raw_bitmaps;
mod qmp_replay;
#[cfg(feature = "testing")]
mod raw_bitmaps;
mod service;
#[cfg(feature = "testing")]
mod snapshot;
mod source;
mod style;
#[cfg(feature = "testing")]
mod sweeps;
mod transaction;
#[cfg(feature = "testing")]
mod transaction_crash;
mod transaction_length;

//! The one integration test binary: a module per topic.

mod imports;
mod layers;
mod nbd_peers;
mod nbd_raw;
mod nbd_server;
mod source;
mod style;

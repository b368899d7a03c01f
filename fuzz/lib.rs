//! The functions that the targets fuzz are those of the integration tests, so that they cannot rot.

#![allow(dead_code, unused_imports)]

#[path = "../tests/it/chain.rs"]
mod chain;
#[path = "../tests/it/fuzzed.rs"]
mod fuzzed;
#[path = "../tests/it/hostile.rs"]
mod hostile;

/// Opens, reads, writes and checks an image.
pub fn qcow2_image(bytes: &[u8]) {
    hostile::abuse_any(bytes);
}

/// See [`fuzzed::qmp_session`].
pub fn qmp_session(bytes: &[u8]) {
    fuzzed::qmp_session(bytes);
}

/// See [`fuzzed::nbd_connection`].
pub fn nbd_connection(bytes: &[u8]) {
    fuzzed::nbd_connection(bytes);
}

/// See [`fuzzed::nbd_server`].
pub fn nbd_server(bytes: &[u8]) {
    fuzzed::nbd_server(bytes);
}

/// See [`fuzzed::option_value`].
pub fn option_value(bytes: &[u8]) {
    fuzzed::option_value(bytes);
}

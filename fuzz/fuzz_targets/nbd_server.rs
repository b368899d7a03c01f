#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| liveblk_fuzz::nbd_server(bytes));

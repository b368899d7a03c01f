//! The storage daemon.

fn main() {}
